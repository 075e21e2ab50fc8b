"""Train the transformer: `python -m demo.llm.train` encodes the captions once and trains. Interrupted training goes on.

The encoder is frozen. Flow matching as Z-Image has it: the transformer is told 1 - σ and predicts x₀ - ε. Nothing in
the training makes the encoder or the transformer easier to edit. All data of a step lie on the device.
"""

import argparse
import copy
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from demo import art
from demo.captions import PLAIN, Caption
from demo.classify import Classifier, classify, load_classifier
from demo.concepts import DRAWN_STYLES, Concept
from demo.llm.build import TRANSFORMER, load_autoencoder
from demo.llm.captions import HELD_OUT, sample
from demo.llm.concepts import CLASSIFIER, read_all_concepts
from demo.llm.draw import draw_captions
from demo.llm.encoder import encode_captions, load_encoder
from demo.llm.transformer import CAPTION_LENGTH, LATENT_SIDE, Captions, build_transformer, predict_velocity
from demo.train.autoencoder import Latents, latents
from demo.train.grid import save_grid
from demo.train.loop import Schedule, Training
from demo.train.unet import CENTRED_SHARE, PictureChoice

NAME = "llm-transformer"
SCHEDULE = Schedule(steps=25_000, batch=32, rate=1.2e-3, decay_from=0.0, checkpoint_every=50, sample_every=250)
CAPTIONS = 12_000
EMA = 0.999
EMPTY_SHARE = 0.10
NOISE_SPREAD, NOISE_SHIFT = 1.2, 0.4  # σ = sigmoid(1.2 n + 0.4), n normal
CHOICES = 16  # pictures that are chosen for each caption before the training
PROBED = 64  # pictures of untrained templates that are judged while training; half as many of trained ones
PROBED_STEPS, PROBED_GUIDANCE = 10, 2.0

Encode = Callable[[Sequence[str]], Captions]
"""Encodes texts, as `demo.llm.encoder.encode_captions` does."""


def encode_texts(texts: Sequence[str], path: Path, load: Callable[[], Encode]) -> Captions:
    """Return the texts' states in float16, read from `path` where these texts were encoded before.

    `load` returns the encoder's function and is called only when it is needed.
    """
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    positions = torch.arange(CAPTION_LENGTH)
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata() == {"sha256": digest}:
                states, lengths = file.get_tensor("states"), file.get_tensor("lengths")
                padded = states.new_zeros(len(lengths), CAPTION_LENGTH, states.shape[1])
                padded[positions < lengths[:, None]] = states
                return Captions(padded, lengths)
    encoded = load()(texts).to("cpu")
    states = encoded.states[positions < encoded.lengths[:, None]].half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"states": states, "lengths": encoded.lengths}, path, metadata={"sha256": digest})
    return Captions(encoded.states.half(), encoded.lengths)


def probe_prompts(concepts: Sequence[Concept], *, count: int = PROBED) -> tuple[list[str], list[int]]:
    """Return prompts and the indices of their concepts: `count` of held-out templates, then half as many of others."""
    chance = random.Random(1)
    templates = [HELD_OUT[index % len(HELD_OUT)] for index in range(count)]
    templates += [PLAIN[index % len(PLAIN)] for index in range(count // 2)]
    wanted = [chance.randrange(len(concepts)) for _ in templates]
    prompts = [template.format(concepts[index].name) for template, index in zip(templates, wanted, strict=True)]
    return prompts, wanted


@dataclass(frozen=True)
class TemplateProbe:
    """The prompts of `probe_prompts`, which are drawn and judged while training."""

    captions: Captions
    wanted: Tensor  # (n,) indices of concepts
    empty: Captions
    autoencoder: AutoencoderKL
    classifier: Classifier

    def judge(self, transformer: ZImageTransformer2DModel) -> tuple[dict[str, float], Tensor]:
        """Return top-1 of both kinds of templates, and the pictures."""
        noise = torch.randn(len(self.wanted), 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(0))
        pictures = draw_captions(
            transformer,
            self.autoencoder,
            self.captions,
            self.empty,
            noise.to(self.captions.states.device),
            steps=PROBED_STEPS,
            guidance_scale=PROBED_GUIDANCE,
        )
        right = (classify(pictures, self.classifier).concept.argmax(1).cpu() == self.wanted).float()
        held_out, trained = right.split([len(right) - len(right) // 3, len(right) // 3])
        return {"held_out": held_out.mean().item(), "trained": trained.mean().item()}, pictures


def choose_pictures(captions: Sequence[Caption], choice: PictureChoice, *, seed: int = 0) -> Tensor:
    """Return (captions, 16) indices of pictures that each caption may stand for, drawn at random."""
    chance = random.Random(seed)
    return torch.tensor([[choice.choose(caption, chance) for _ in range(CHOICES)] for caption in captions])


@dataclass(frozen=True)
class TrainingData:
    """What a step draws from, on the device that trains."""

    captions: Captions
    pictures: Tensor  # (captions, 16), see `choose_pictures`
    empty: Captions
    latents: Latents

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, Captions]:
        """Return latents (size, 4, 8, 8) and their captions, some of them empty."""
        device = generator.device

        def draw(limit: int) -> Tensor:
            return torch.randint(limit, (size,), generator=generator, device=device)

        def happens(share: float) -> Tensor:
            return torch.rand(size, generator=generator, device=device) < share

        rows = draw(len(self.pictures))
        pictures = self.pictures[rows, draw(self.pictures.shape[1])]
        copies = draw(self.latents.mean.shape[1]) * ~happens(CENTRED_SHARE)
        mean, std = self.latents.mean[pictures, copies], self.latents.std[pictures, copies]
        is_empty = happens(EMPTY_SHARE)
        captions = Captions(
            torch.where(is_empty[:, None, None], self.empty.states, self.captions.states[rows]),
            torch.where(is_empty, self.empty.lengths, self.captions.lengths[rows]),
        )
        return mean + std * torch.randn(mean.shape, generator=generator, device=device), captions


def flow_loss(
    transformer: ZImageTransformer2DModel, x0: Tensor, captions: Captions, generator: torch.Generator
) -> Tensor:
    """Return the mean square error of the velocity at a random noise level of each picture."""
    normal = torch.randn(len(x0), generator=generator, device=x0.device)
    sigmas = torch.sigmoid(NOISE_SPREAD * normal + NOISE_SHIFT)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    sigma = sigmas[:, None, None, None]
    noised = (1 - sigma) * x0 + sigma * noise
    return (predict_velocity(transformer, noised, sigmas, captions) - (x0 - noise)).square().mean()


def train(
    transformer: ZImageTransformer2DModel,
    data: TrainingData,
    folder: Path,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    probe: TemplateProbe | None = None,
    captured: bool = False,
    bfloat16: bool = False,
) -> ZImageTransformer2DModel:
    """Train, or go on training, and return the moving average of the weights, frozen."""
    averaged = copy.deepcopy(transformer).eval().requires_grad_(False)
    weights, average = list(transformer.parameters()), list(averaged.parameters())
    training = Training(
        folder, NAME, {"model": transformer}, schedule, seed=seed, kept=averaged.state_dict(), captured=captured
    )
    training.resume()

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = data.batch(generator, schedule.batch)
        with torch.autocast(generator.device.type, torch.bfloat16, enabled=bfloat16):
            return {"loss": flow_loss(transformer, *batch, generator)}

    @torch.no_grad()
    def update_average() -> None:
        torch._foreach_lerp_(average, weights, 1 - min(EMA, (1 + training.step) / (10 + training.step)))

    def record(step: int) -> None:
        """Add a line to the curve: smoothed loss, top-1 of both kinds of templates."""
        line: dict[str, object] = {"step": step, "seconds": round(training.seconds, 1), **training.shown}
        if probe is not None:
            line["top1"], pictures = probe.judge(averaged)
            save_grid(pictures.cpu(), folder / "grids" / f"{NAME}-{step}.png", columns=16)
        with (folder / f"{NAME}.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(line) + "\n")
        tqdm.write(json.dumps(line))

    training.run(loss, after_update=update_average, sample=record)
    return averaged


def export(transformer: ZImageTransformer2DModel, folder: Path) -> None:
    """Save the transformer in float16."""
    transformer.half().save_pretrained(folder, safe_serialization=True)


def drawn_art(pictures: art.Art) -> art.Art:
    """Return the pictures of the styles that a caption can name."""
    kept = pictures.style < len(DRAWN_STYLES)
    return art.Art(*(column[kept] for column in (pictures.pictures, pictures.concept, pictures.style, pictures.gender)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.llm.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=art.WORK, help="folder of art and checkpoints (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--captured", action="store_true", help="replay each step as a CUDA graph")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16; weights stay float32")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="begin at the weights of this transformer")
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps, help="steps in all (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="end after so many seconds of steps, in place of --steps")
    parser.add_argument("--batch", type=int, default=SCHEDULE.batch, help="pictures a step (default: %(default)s)")
    parser.add_argument(
        "--sample-every",
        type=int,
        default=SCHEDULE.sample_every,
        help="steps from one line of the curve to the next (default: %(default)s)",
    )
    parser.add_argument(
        "--rate", type=float, default=SCHEDULE.rate, help="highest learning rate (default: %(default)s)"
    )
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="captions to encode (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of captions and steps (default: %(default)s)")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="its weights (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=Path,
        default=TRANSFORMER,
        help="where the result is written (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    classifier = load_classifier(given.classifier).to(device)
    concepts, art_file = read_all_concepts(), given.work / "art-all.safetensors"
    if not art_file.is_file():
        art.prepare(art.install_packages(given.work / "art"), art_file, concepts)
    pictures = drawn_art(art.load(art_file, concepts))
    chance = random.Random(given.seed)
    captions = [sample(chance, concepts) for _ in range(given.captions)]
    prompts, wanted = probe_prompts(concepts)

    def load() -> Encode:
        tokenizer, encoder = load_encoder()
        encoder.to(device)
        batch = 32 if device.type == "cpu" else 512
        return partial(encode_captions, tokenizer, encoder, batch=batch, dtype=torch.float16, shown_as="texts")

    encoded = encode_texts(
        [*(caption.text for caption in captions), *prompts, ""], given.work / "llm-captions.safetensors", load
    ).to(device)
    said, empty = encoded[: len(captions)], encoded[-1:]
    fits = said.lengths <= CAPTION_LENGTH
    tqdm.write(f"{int((~fits).sum())} of {len(captions)} captions have more than {CAPTION_LENGTH} tokens; left out")

    autoencoder = load_autoencoder().to(device)
    data = TrainingData(
        said[fits],
        choose_pictures(captions, PictureChoice(pictures, concepts), seed=given.seed).to(device)[fits],
        empty,
        latents(autoencoder, replace(pictures, pictures=pictures.pictures.to(device))),
    )
    probe = TemplateProbe(
        encoded[len(captions) : -1],
        torch.tensor(wanted),
        empty,
        autoencoder,
        classifier,
    )
    torch.manual_seed(given.seed)
    transformer = build_transformer()
    if given.init is not None:
        transformer = ZImageTransformer2DModel.from_pretrained(given.init, torch_dtype=torch.float32).train()
    schedule = replace(
        SCHEDULE,
        steps=given.steps,
        seconds=given.seconds,
        batch=given.batch,
        rate=given.rate,
        sample_every=given.sample_every,
        checkpoint_every=given.sample_every if device.type == "cuda" else SCHEDULE.checkpoint_every,
    )
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, where captions were encoded without it
    trained = train(
        transformer.to(device),
        data,
        given.work / "checkpoints",
        schedule=schedule,
        seed=given.seed,
        probe=probe,
        captured=given.captured,
        bfloat16=given.bfloat16,
    )
    export(trained, given.weights)


if __name__ == "__main__":
    main()
