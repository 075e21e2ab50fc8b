"""The classifier's training: pictures of all five styles, as drawn and as the autoencoder gives them back,
disturbed."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from demo.art import SIZE, Art
from demo.classify import WIDTHS, Classes, Classifier
from demo.concepts import GENDERS, STYLES, Concept
from demo.train.grid import as_bytes, as_floats
from demo.train.loop import Schedule, Training, trained

NAME = "classifier"
SCHEDULE = Schedule(steps=2200, batch=64, rate=2e-3, weight_decay=0.02)
REBUILT_SHARE = 0.5


def classes(concepts: Sequence[Concept]) -> Classes:
    return Classes(tuple(concept.name for concept in concepts), STYLES, GENDERS)


@torch.no_grad()
def rebuilt(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return every picture (N, copies, 3, 32, 32) through the autoencoder, uint8 as they were."""
    parts = []
    for part in pictures.flatten(0, 1).split(128):
        parts.append(as_bytes(autoencoder.decode(autoencoder.encode(as_floats(part)).latent_dist.mean).sample))
    return torch.cat(parts).unflatten(0, pictures.shape[:2])


def both_kinds(autoencoder: AutoencoderKL, art: Art, *, device: str = "cpu") -> Tensor:
    """Return the pictures as drawn and as rebuilt, (2, N, copies, 3, 32, 32) uint8, on the device."""
    pictures = art.pictures.to(device)
    return torch.stack([pictures, rebuilt(autoencoder.to(device), pictures)])


def train(
    art: Art,
    both: Tensor,
    concepts: Sequence[Concept],
    folder: Path,
    *,
    name: str = NAME,
    schedule: Schedule = SCHEDULE,
    widths: Sequence[int] = WIDTHS,
) -> None:
    """Train, or go on training, on the device that holds `both`, which `both_kinds` made.

    The losses of the three heads are added; gender counts on pictures of professions only.
    """
    device = both.device
    torch.manual_seed(0)
    model = Classifier(classes(concepts), widths).to(device)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    training = Training(folder, name, {"model": model}, schedule)
    training.resume()
    shown = [column.to(device) for column in (art.concept, art.style, art.gender)]
    copies = art.pictures.shape[1]

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        chance = random.Random(generator.initial_seed())
        rows = torch.randint(len(art), (schedule.batch,), generator=generator, device=device)
        copy = torch.randint(copies, (schedule.batch,), generator=generator, device=device)
        source = (torch.rand(schedule.batch, generator=generator, device=device) < REBUILT_SHARE).long()
        pictures = disturbed(as_floats(both[source, rows, copy]), chance, generator)
        model.train()
        logits = model(pictures.contiguous(memory_format=torch.channels_last))
        concept, style, gender = (column[rows] for column in shown)
        terms = {
            "concept": F.cross_entropy(logits["concept"], concept),
            "style": F.cross_entropy(logits["style"], style),
            "gender": F.cross_entropy(logits["gender"], gender, ignore_index=-1)
            if (gender >= 0).any()
            else torch.zeros((), device=device),
        }
        right = (logits["concept"].argmax(1) == concept).float().mean()
        style_right = (logits["style"].argmax(1) == style).float().mean()
        return {"loss": terms["concept"] + terms["style"] + terms["gender"]} | {
            "right": right,
            "style right": style_right,
            "gender": terms["gender"].detach(),
        }

    training.run(loss)


def disturbed(pictures: Tensor, chance: random.Random, generator: torch.Generator) -> Tensor:
    """Return the batch (rows, 3, 32, 32) shifted by up to two pixels, sometimes blurred, with noise, contrast and tint
    changed a little. The generator is on the pictures' device."""
    padded = F.pad(pictures, (2, 2, 2, 2), value=1.0)
    top, left = chance.randrange(5), chance.randrange(5)
    pictures = padded[..., top : top + SIZE, left : left + SIZE]
    if chance.random() < 0.3:
        side = chance.choice((16, 20, 24))
        small = F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)
        pictures = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
    rows, device = len(pictures), pictures.device
    contrast = 1 + 0.1 * torch.randn(rows, 1, 1, 1, generator=generator, device=device)
    tint = 0.04 * torch.randn(rows, 3, 1, 1, generator=generator, device=device)
    noise = 0.06 * chance.random() * torch.randn(pictures.shape, generator=generator, device=device)
    return ((pictures - 1) * contrast + 1 + tint + noise).clamp(-1, 1)


def load(concepts: Sequence[Concept], folder: Path, *, name: str = NAME, widths: Sequence[int] = WIDTHS) -> Classifier:
    """Return the trained classifier, frozen."""
    model = Classifier(classes(concepts), widths)
    model.load_state_dict(trained(folder, name, "model"))
    return model.eval().requires_grad_(False)


def export(classifier: Classifier, path: Path) -> None:
    """Save the weights in float16, with the classes that `demo.classify.load_classifier` reads."""
    weights = {key: value for key, value in classifier.state_dict().items() if not key.endswith("num_batches_tracked")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_with_facts({key: value.half() for key, value in weights.items()}, path, classes=vars(classifier.classes))


def save_with_facts(tensors: Mapping[str, Tensor], path: Path, **facts: object) -> None:
    """Save with one metadata key holding JSON: with two, the order of the keys, and so the file's bytes, would vary."""
    ((name, value),) = facts.items()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={name: json.dumps(value)})
