"""The U-Net: latent diffusion on the frozen autoencoder and text encoder, by several one-thread processes.

Two one-thread processes that average their gradients beat two threads of one process by far on a busy machine.
"""

import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, distributed
from torch.multiprocessing import spawn
from transformers import CLIPTextModel, CLIPTokenizer

from demo.art import Art
from demo.captions import ANY_STYLE, Caption, sample
from demo.concepts import DRAWN_STYLES, Concept
from demo.train.autoencoder import Latents
from demo.train.grid import save_grid
from demo.train.loop import Schedule, Training, trained
from demo.train.text_encoder import states
from demo.train.tokenizer import LENGTH, tokenize

NAME = "unet"
SCHEDULE = Schedule(steps=10_000, batch=32, rate=8e-4, warmup=100, decay_from=0.2, weight_decay=1e-3)
WIDTHS = (96, 160)
CAPTIONS = 24_000
EMA = 0.999
SNR_LIMIT = 5.0  # min-SNR-γ weighting (Hang et al., 2023)
# Which picture of a concept is drawn is settled at the highest noise, where an error of x_0 is a small one of ε: there
# errors weigh as those of x_0 do, up to a limit.
CLEAN_SNR, CLEAN_LIMIT = 0.25, 8.0
EMPTY_SHARE = 0.10
CENTRED_SHARE = 0.85  # with more shifted copies, what sets styles apart drowns in where the picture lies
# Shares of the captions whose subject, or whose words all, are replaced by zeros or another row's: what an edit
# changes is seen by the end token and the padding, so the U-Net must read the concept there.
WITHOUT_SUBJECT, WITHOUT_WORDS = 0.14, 0.08


def noise_schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build(*, widths: tuple[int, ...] = WIDTHS, text_width: int = 160, sample_size: int = 8) -> UNet2DConditionModel:
    blocks = len(widths)
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * blocks,
        up_block_types=("CrossAttnUpBlock2D",) * blocks,
        cross_attention_dim=text_width,
        attention_head_dim=(3, 5)[:blocks],
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class CaptionStates:
    """Captions encoded once, and the pictures that each may stand for.

    `states` (captions, 24, width) float16; `words` and `subject` (captions, 24) bool mark all words and the subject's;
    `empty` (24, width) is the empty prompt's; `pools[i]` are the indices of caption i's pictures.
    """

    states: Tensor
    words: Tensor
    subject: Tensor
    empty: Tensor
    captions: list[Caption]


@torch.no_grad()
def encode_captions(
    concepts: Sequence[Concept],
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    *,
    count: int = CAPTIONS,
    seed: int = 0,
) -> CaptionStates:
    """Draw and encode `count` captions."""
    chance = random.Random(seed)
    captions = [sample(chance, concepts) for _ in range(count)]
    tokens = tokenize(tokenizer, [c.template for c in captions], [c.subject for c in captions])
    read = torch.cat([states(encoder, part).half() for part in tokens.ids.split(256)])
    positions = torch.arange(LENGTH)
    words = (positions >= 1) & (positions < tokens.end[:, None])
    subject = (positions >= tokens.first_subject[:, None]) & (positions <= tokens.subject[:, None])
    empty = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    return CaptionStates(read, words, subject, states(encoder, empty)[0], captions)


class PictureChoice:
    """Which picture a caption stands for: its concept, gender and style, drawn at random where the caption leaves
    them open, and the style also where the concept has no picture in the one named."""

    def __init__(self, art: Art, concepts: Sequence[Concept]) -> None:
        self.concepts = concepts
        self.pools: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for index, key in enumerate(zip(art.concept.tolist(), art.style.tolist(), art.gender.tolist(), strict=True)):
            self.pools[key].append(index)
        drawn = sorted({(concept, style) for concept, style, _ in self.pools if style < len(DRAWN_STYLES)})
        self.styles: dict[int, list[int]] = defaultdict(list)  # of each concept
        self.shown: dict[int, list[int]] = defaultdict(list)  # concepts of each style
        for concept, style in drawn:
            self.styles[concept].append(style)
            self.shown[style].append(concept)

    def choose(self, caption: Caption, chance: random.Random) -> int:
        if caption.concept is not None:
            concept = caption.concept
        elif caption.style is not None:
            concept = chance.choice(self.shown[caption.style])
        else:
            concept = chance.randrange(len(self.concepts))
        styles = self.styles[concept]
        style = caption.style if caption.style in styles else chance.choice(styles)
        gender = -1
        skew = self.concepts[concept].skew
        if skew is not None:
            gender = caption.gender if caption.gender is not None else int(chance.random() >= skew)
        return chance.choice(self.pools[concept, style, gender])


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (batch, 4, 8, 8)
    text: Tensor  # (batch, 24, width)


def sample_batch(
    caption_states: CaptionStates, latents: Latents, choice: PictureChoice, generator: torch.Generator, *, size: int
) -> Batch:
    """Captions with a picture each; some emptied, some without their subject or words."""
    chance = random.Random(generator.initial_seed())
    rows = [chance.randrange(len(caption_states.captions)) for _ in range(size)]
    pictures = torch.tensor([choice.choose(caption_states.captions[row], chance) for row in rows])
    copies = latents.mean.shape[1]
    copy = torch.tensor([0 if chance.random() < CENTRED_SHARE else chance.randrange(copies) for _ in rows])
    mean, std = latents.mean[pictures, copy], latents.std[pictures, copy]
    text = caption_states.states[rows].float()
    fate = torch.rand(size, generator=generator)
    removed = torch.where(
        (fate < WITHOUT_SUBJECT)[:, None],
        caption_states.subject[rows],
        caption_states.words[rows] & (fate < WITHOUT_SUBJECT + WITHOUT_WORDS)[:, None],
    )
    instead = text.roll(1, 0) * (torch.rand(size, 1, 1, generator=generator) < 0.5)
    text = torch.where(removed[..., None], instead, text)
    text = torch.where((fate > 1 - EMPTY_SHARE)[:, None, None], caption_states.empty, text)
    return Batch(mean + std * torch.randn(mean.shape, generator=generator), text)


@dataclass(frozen=True)
class TrainingInputs:
    """What every process needs."""

    art: Art
    latents: Latents
    caption_states: CaptionStates
    shown: Tensor  # (pictures, 24, width): states of the sample grid's captions
    autoencoder: AutoencoderKL
    concepts: list[Concept]
    folder: Path
    schedule: Schedule
    widths: tuple[int, ...]
    warm_start: Path | None
    processes: int


def train(work: TrainingInputs) -> None:
    """Train, or go on training, with `work.processes` one-thread processes; each takes its share of the batch."""
    for tensor in (
        work.caption_states.states,
        work.caption_states.words,
        work.caption_states.subject,
        work.latents.mean,
        work.latents.std,
        work.art.pictures,
    ):
        tensor.share_memory_()
    if work.processes == 1:
        _train_process(0, work, None)
        return
    with tempfile.TemporaryDirectory() as meeting:
        spawn(_train_process, args=(work, f"{meeting}/store"), nprocs=work.processes)


def _train_process(rank: int, work: TrainingInputs, store: str | None) -> None:
    if store is not None:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=work.processes)
    torch.manual_seed(0)
    model = build(widths=work.widths, text_width=work.caption_states.empty.shape[-1])
    if work.warm_start is not None:
        weights = UNet2DConditionModel.from_pretrained(
            work.warm_start, subfolder="unet", dtype=torch.float32
        ).state_dict()
        model.load_state_dict(weights)
    model.to(memory_format=torch.channels_last)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    training = Training(work.folder, NAME, {"model": model}, work.schedule, rank=rank, kept=average)
    training.resume()
    choice = PictureChoice(work.art, work.concepts)
    alphas = noise_schedule().alphas_cumprod

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = sample_batch(
            work.caption_states, work.latents, choice, generator, size=work.schedule.batch // work.processes
        )
        times = torch.randint(len(alphas), (len(batch.latents),), generator=generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        kept = alphas[times][:, None, None, None]
        noised = (kept.sqrt() * batch.latents + (1 - kept).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        error = (model(noised, times, batch.text).sample - noise).square().mean((1, 2, 3))
        ratio = alphas[times] / (1 - alphas[times])
        weight = ratio.clamp(max=SNR_LIMIT) / ratio * (CLEAN_SNR / ratio).clamp(1, CLEAN_LIMIT)
        weighted = (error * weight).mean()
        return {"loss": weighted, "error": error.mean().detach()}

    def average_gradients() -> None:
        gradients = [parameter.grad for parameter in training.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= work.processes
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def update_average() -> None:
        decay = min(EMA, (1 + training.step) / (10 + training.step))
        for key, value in model.state_dict().items():
            average[key].lerp_(value, 1 - decay)

    def show(step: int) -> None:
        drawn = build(widths=work.widths, text_width=work.caption_states.empty.shape[-1])
        drawn.load_state_dict(average)
        pictures = draw(drawn, work.autoencoder, work.shown, work.caption_states.empty, seed=0)
        save_grid(pictures, work.folder / "grids" / f"{NAME}-{step}.png", columns=20)

    training.run(
        loss,
        before_update=average_gradients if store is not None else None,
        after_update=update_average,
        sample=show,
    )
    if store is not None:
        distributed.destroy_process_group()


@torch.no_grad()
def draw(
    unet: UNet2DConditionModel,
    autoencoder: AutoencoderKL,
    text: Tensor,
    empty: Tensor,
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 3.0,
) -> Tensor:
    """Pictures (rows, 3, 32, 32) in [-1, 1] of text states (rows, 24, width), by DDIM with guidance away from
    `empty`."""
    scheduler = noise_schedule()
    scheduler.set_timesteps(steps)
    side = unet.config["sample_size"]
    noisy = torch.randn(len(text), 4, side, side, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([empty.expand_as(text), text])
    for time in scheduler.timesteps:
        without, with_text = unet(torch.cat([noisy, noisy]), time, both).sample.chunk(2)
        noisy = scheduler.step(without + guidance * (with_text - without), time, noisy).prev_sample
    return autoencoder.decode(noisy / autoencoder.config["scaling_factor"]).sample.clamp(-1, 1)


def shown_prompts(concepts: Sequence[Concept]) -> list[str]:
    """Draw the sample grid: two rows of concepts, one of styles, one of professions."""
    objects = [concept.name for concept in concepts if concept.skew is None]
    professions = [concept.name for concept in concepts if concept.skew is not None]
    named = [f"an image of {name}" for name in objects[:: max(1, len(objects) // 40)][:40]]
    words = (*DRAWN_STYLES, ANY_STYLE)
    styles = [f"a {name} in the style of {word}" for name in objects[6::60][:5] for word in words]
    gendered = [f"a photo of {word}{name}" for name in professions[:5] for word in ("", "man ", "woman ", "female ")]
    return named + styles + gendered


def load(folder: Path, *, widths: tuple[int, ...] = WIDTHS, text_width: int = 160) -> UNet2DConditionModel:
    """Return the moving average of the last checkpoint, frozen."""
    model = build(widths=widths, text_width=text_width)
    model.load_state_dict(trained(folder, NAME, "kept"))
    return model.eval().requires_grad_(False)
