"""Train the transformer: `python -m demo.llm.train` encodes the captions once and trains. Interrupted training goes on.

The encoder is frozen. Flow matching as Z-Image has it: the transformer is told 1 - σ and predicts x₀ - ε. Nothing in
the training makes the encoder or the transformer easier to edit.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
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
from demo.concepts import DRAWN_STYLES, Concept, read_concepts
from demo.llm.build import TRANSFORMER, load_autoencoder
from demo.llm.captions import HELD_OUT, sample, varied_templates
from demo.llm.encoder import encode_prompts, load_encoder
from demo.llm.transformer import LATENT_SIDE, Captions, build_transformer, draw_latents, predict_velocity
from demo.train.autoencoder import Latents, latents
from demo.train.grid import save_grid
from demo.train.loop import Schedule, Training, trained
from demo.train.unet import CENTRED_SHARE, PictureChoice

NAME = "llm-transformer"
SCHEDULE = Schedule(steps=25_000, batch=32, rate=1.2e-3, decay_from=0.0, checkpoint_every=50, sample_every=250)
CAPTIONS = 12_000
EMA = 0.998
EMPTY_SHARE = 0.10
NOISE_SPREAD, NOISE_SHIFT = 1.2, 0.4  # σ = sigmoid(1.2 n + 0.4), n normal
PROBED = 64  # pictures of untrained templates that are judged while training; half as many of trained ones
PROBED_STEPS, PROBED_GUIDANCE = 10, 2.0


Encode = Callable[[Sequence[str]], Sequence[Tensor]]
"""Encodes texts to (tokens, width) each."""


def draw_captions(concepts: Sequence[Concept], *, count: int, seed: int = 0) -> list[Caption]:
    """Return `count` captions of the training, the same for the same seed."""
    chance, templates = random.Random(seed), varied_templates()
    return [sample(chance, concepts, templates) for _ in range(count)]


def encode_texts(texts: Sequence[str], path: Path, load: Callable[[], Encode]) -> Sequence[Tensor]:
    """Return (tokens, width) of each text in float16, read from `path` where these texts were encoded before.

    The encoder is loaded only when it is needed.
    """
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata() == {"sha256": digest}:
                return file.get_tensor("states").split(file.get_tensor("lengths").tolist())
    encode = load()
    # Of like length together, so that little is padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    encoded: dict[int, Tensor] = {}
    for start in tqdm(range(0, len(order), 32), desc="texts", unit="batch", mininterval=10):
        rows = order[start : start + 32]
        read = encode([texts[row] for row in rows])
        encoded |= {row: states.half() for row, states in zip(rows, read, strict=True)}
    states = [encoded[row] for row in range(len(texts))]
    lengths = torch.tensor([len(each) for each in states])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"states": torch.cat(states), "lengths": lengths}, path, metadata={"sha256": digest})
    return states


@dataclass(frozen=True)
class TemplateProbe:
    """Prompts that are drawn and judged while training: of templates that are trained on, and of others."""

    captions: Captions
    wanted: Tensor  # (n,) indices of concepts
    empty: Captions
    is_held_out: Tensor  # (n,)
    autoencoder: AutoencoderKL
    classifier: Classifier

    @classmethod
    def choose(
        cls, concepts: Sequence[Concept], encode: Encode, autoencoder: AutoencoderKL, *, count: int = PROBED
    ) -> "TemplateProbe":
        """Choose concepts at random, and for each the next template."""
        chance = random.Random(1)
        prompts, wanted, is_held_out = [], [], []
        for templates, number, held_out in ((HELD_OUT, count, True), (PLAIN, count // 2, False)):
            for index in range(number):
                concept = chance.randrange(len(concepts))
                prompts.append(templates[index % len(templates)].format(concepts[concept].name))
                wanted.append(concept)
                is_held_out.append(held_out)
        *encoded, empty = encode([*prompts, ""])
        return cls(
            Captions.of(encoded),
            torch.tensor(wanted),
            Captions.of([empty]),
            torch.tensor(is_held_out),
            autoencoder,
            load_classifier(),
        )

    @torch.no_grad()
    def judge(self, transformer: ZImageTransformer2DModel) -> tuple[dict[str, float], Tensor]:
        """Return top-1 of both kinds of templates, and the pictures."""
        noise = torch.randn(len(self.wanted), 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(0))
        drawn = [
            draw_latents(
                transformer,
                Captions(self.captions.states[part], self.captions.lengths[part]),
                self.empty,
                noise[part],
                steps=PROBED_STEPS,
                guidance_scale=PROBED_GUIDANCE,
            )
            for part in torch.arange(len(noise)).split(32)
        ]
        scale = self.autoencoder.config["scaling_factor"]
        pictures = self.autoencoder.decode(torch.cat(drawn) / scale).sample.clamp(-1, 1)
        right = (classify(pictures, self.classifier).concept.argmax(1) == self.wanted).float()
        top1 = {"held_out": right[self.is_held_out].mean().item(), "trained": right[~self.is_held_out].mean().item()}
        return top1, pictures


@dataclass(frozen=True)
class TrainingData:
    """What a step draws from."""

    captions: Sequence[Caption]
    encoded: Sequence[Tensor]  # (tokens, width) of each caption
    empty: Tensor  # (tokens, width)
    latents: Latents
    choice: PictureChoice

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, Captions]:
        """Return latents (size, 4, 8, 8) and their captions, some of them empty."""
        chance = random.Random(generator.initial_seed())
        rows = [chance.randrange(len(self.captions)) for _ in range(size)]
        pictures = torch.tensor([self.choice.choose(self.captions[row], chance) for row in rows])
        copies = self.latents.mean.shape[1]
        copy = torch.tensor([0 if chance.random() < CENTRED_SHARE else chance.randrange(copies) for _ in rows])
        mean, std = self.latents.mean[pictures, copy], self.latents.std[pictures, copy]
        captions = Captions.of([self.empty if chance.random() < EMPTY_SHARE else self.encoded[row] for row in rows])
        return mean + std * torch.randn(mean.shape, generator=generator), captions


def flow_loss(
    transformer: ZImageTransformer2DModel, x0: Tensor, captions: Captions, generator: torch.Generator
) -> Tensor:
    """Return the mean square error of the velocity at a random noise level of each picture."""
    sigmas = torch.sigmoid(NOISE_SPREAD * torch.randn(len(x0), generator=generator) + NOISE_SHIFT)
    noise = torch.randn(x0.shape, generator=generator)
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
) -> ZImageTransformer2DModel:
    """Train, or go on training, and return the moving average of the weights, frozen."""
    average = {key: value.detach().clone() for key, value in transformer.state_dict().items()}
    training = Training(folder, NAME, {"model": transformer}, schedule, seed=seed, kept=average)
    training.resume()
    smoothed: list[float] = []
    started = time.perf_counter()

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        error = flow_loss(transformer, *data.batch(generator, schedule.batch), generator)
        smoothed.append(error.item())
        return {"loss": error}

    @torch.no_grad()
    def update_average() -> None:
        decay = min(EMA, (1 + training.step) / (10 + training.step))
        for key, value in transformer.state_dict().items():
            average[key].lerp_(value, 1 - decay)

    def record(step: int) -> None:
        """Add a line to the curve: loss since the last line, top-1 of both kinds of templates."""
        line: dict[str, object] = {
            "step": step,
            "loss": sum(smoothed) / len(smoothed),
            "seconds": time.perf_counter() - started,
        }
        smoothed.clear()
        if probe is not None:
            top1, pictures = probe.judge(_averaged(transformer, average))
            line["top1"] = top1
            save_grid(pictures, folder / "grids" / f"{NAME}-{step}.png", columns=16)
        with (folder / f"{NAME}.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(line) + "\n")
        tqdm.write(json.dumps(line))

    training.run(loss, after_update=update_average, sample=record)
    return _averaged(transformer, average)


def _averaged(transformer: ZImageTransformer2DModel, average: dict[str, Tensor]) -> ZImageTransformer2DModel:
    model = ZImageTransformer2DModel.from_config(transformer.config)
    model.load_state_dict(average)
    return model.eval().requires_grad_(False)


def load_trained(folder: Path) -> ZImageTransformer2DModel:
    """Return the moving average of the last checkpoint. Raises FileNotFoundError when there is none."""
    model = build_transformer()
    model.load_state_dict(trained(folder, NAME, "kept"))
    return model.eval().requires_grad_(False)


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
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="begin at the weights of this transformer")
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps, help="steps in all (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=SCHEDULE.rate, help="highest learning rate (default: %(default)s)"
    )
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="captions to encode (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of captions and steps (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=Path,
        default=TRANSFORMER,
        help="where the result is written (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    art_file, folder = given.work / "art.safetensors", given.work / "checkpoints"
    if not art_file.is_file():
        art.prepare(art.install_packages(given.work / "art"), art_file)
    torch.manual_seed(given.seed)
    transformer = build_transformer()
    if given.init is not None:
        initial = ZImageTransformer2DModel.from_pretrained(given.init, torch_dtype=torch.float32)
        transformer.load_state_dict(initial.state_dict())

    concepts, pictures = read_concepts(), drawn_art(art.load(art_file))
    autoencoder = load_autoencoder()
    load = cache(lambda: partial(encode_prompts, *load_encoder()))
    captions = draw_captions(concepts, count=given.captions, seed=given.seed)
    encoded = encode_texts([caption.text for caption in captions], given.work / "llm-captions.safetensors", load)
    probe = TemplateProbe.choose(
        concepts, partial(encode_texts, path=given.work / "llm-prompts.safetensors", load=load), autoencoder
    )
    load.cache_clear()  # half a gigabyte that training does not need
    data = TrainingData(
        captions,
        encoded,
        probe.empty.states[0, : int(probe.empty.lengths[0])],
        latents(autoencoder, pictures),
        PictureChoice(pictures, concepts),
    )
    schedule = dataclasses.replace(SCHEDULE, steps=given.steps, rate=given.rate)
    export(train(transformer, data, folder, schedule=schedule, seed=given.seed, probe=probe), given.weights)


if __name__ == "__main__":
    main()
