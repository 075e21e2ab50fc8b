"""The classifier that judges pictures of the emoji model: which concept, which style, which gender.

It is a small convolutional network trained on the same art (`demo/train/classifier.py`). Its classes stand in the
metadata of its weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from demo.concepts import GENDER_WORDS, GENDERS, WEIGHTS

SIDE = 32
WIDTHS = (40, 80, 128, 192)


@dataclass(frozen=True)
class Classes:
    """The names of the classes of each head, in the order of the logits."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    genders: tuple[str, ...]


@dataclass(frozen=True)
class Confidences:
    """Softmax of each head: `concept` (pictures, concepts), `style` (pictures, styles), `gender` (pictures, 2).

    Gender is only meant for pictures of professions.
    """

    concept: Tensor
    style: Tensor
    gender: Tensor
    classes: Classes

    def of_concept(self, name: str) -> Tensor:
        """(pictures,) confidence of one concept. Raises KeyError naming it when the classifier does not know it."""
        return self.concept[:, _index(self.classes.concepts, name, "concept")]

    def of_style(self, name: str) -> Tensor:
        """(pictures,) confidence of one style."""
        return self.style[:, _index(self.classes.styles, name, "style")]

    def of_gender(self, name: str) -> Tensor:
        """(pictures,) confidence of one gender."""
        return self.gender[:, _index(self.classes.genders, name, "gender")]


def _index(names: Sequence[str], name: str, head: str) -> int:
    if name not in names:
        raise KeyError(f"the classifier knows no {head} {name!r}; demo/concepts.txt lists what it knows")
    return names.index(name)


def _gender(prompt: str) -> str | None:
    """Return the one gender that the prompt's words name; None for none and for several."""
    words = prompt.casefold().split()
    named = [gender for gender in GENDERS if any(word in words for word in GENDER_WORDS[gender])]
    return named[0] if len(named) == 1 else None


class Classifier(nn.Module):
    """Four blocks of two 3 × 3 convolutions, each halving the side, a 2 × 2 pool and a linear head for each
    question."""

    def __init__(self, classes: Classes, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.classes = classes
        blocks: list[nn.Module] = []
        before = 3
        for width in widths:
            for channels in (before, width):
                blocks += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            blocks.append(nn.MaxPool2d(2))
            before = width
        self.features = nn.Sequential(*blocks)
        heads = {"concept": len(classes.concepts), "style": len(classes.styles), "gender": len(classes.genders)}
        self.heads = nn.ModuleDict({name: nn.Linear(before * 4, count) for name, count in heads.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Of the concepts: what `editing.evaluation` knows it by."""
        return self.classes.concepts

    def classify(self, pictures: Sequence[Image.Image], classes: Sequence[str]) -> Tensor:
        """(pictures, classes) confidences of concepts; see `editing.evaluation.classifiers.Classifier`."""
        unknown = [name for name in classes if name not in self.names]
        if unknown:
            from editing.errors import ClassifierUnusable  # training needs nothing else of `editing`

            raise ClassifierUnusable(f"the emoji classifier knows no concept {unknown[0]!r}")
        if not pictures:
            return torch.empty(0, len(classes))
        return classify(pictures, self).concept[:, [self.names.index(name) for name in classes]]

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        """Whether each prompt names a gender of its own, such as "woman doctor"; see
        `editing.debias.attributes.AttributeClassifier`."""
        named = [_gender(prompt) for prompt in prompts]
        return None not in named and len(set(named)) == len(named)

    def classify_attributes(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(pictures, prompts) confidences of the genders that the prompts name."""
        found = classify(pictures, self)
        return found.gender[:, [found.classes.genders.index(_gender(prompt) or "") for prompt in prompts]]

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits of each head for pictures (pictures, 3, 32, 32) with values in [-1, 1]."""
        read = self.features(pictures).flatten(1)
        return {name: head(read) for name, head in self.heads.items()}


def load_classifier(path: Path = WEIGHTS / "classifier.safetensors") -> Classifier:
    """Load the committed classifier, in float32 and evaluation mode. Raises FileNotFoundError when it is not there."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; restore it from git or train the classifier as `demo/README.md` says"
        )
    with safe_open(path, "pt") as file:
        classes = json.loads(file.metadata()["classes"])
        weights = {key: file.get_tensor(key).float() for key in file.keys()}
    widths = [
        weights[key].shape[0]
        for key in sorted(weights, key=_layer)
        if key.startswith("features") and weights[key].dim() == 4
    ]
    model = Classifier(Classes(**{head: tuple(names) for head, names in classes.items()}), widths[::2])
    model.load_state_dict(weights, strict=False)  # the batch counters of the norms are not kept
    return model.eval().requires_grad_(False)


def _layer(key: str) -> int:
    number = key.split(".")[1]
    return int(number) if number.isdigit() else -1


def as_input(pictures: Sequence[Image.Image] | Tensor) -> Tensor:
    """(pictures, 3, 32, 32) in [-1, 1] from PIL images of any size, or from a tensor (pictures, 3, H, W): uint8, or
    floats in [-1, 1].

    Raises ValueError for a tensor of another shape or for no picture at all.
    """
    if isinstance(pictures, Tensor):
        if pictures.dim() != 4 or pictures.shape[1] != 3:
            raise ValueError(f"expected pictures of shape (N, 3, H, W), got {tuple(pictures.shape)}")
        floats = pictures.float() / 127.5 - 1 if pictures.dtype == torch.uint8 else pictures.float()
    else:
        if not pictures:
            raise ValueError("no picture to classify")
        floats = torch.cat([_from_image(picture) for picture in pictures])
    if floats.shape[-2:] != (SIDE, SIDE):
        floats = F.interpolate(floats, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return floats


def _from_image(picture: Image.Image) -> Tensor:
    if picture.mode in ("RGBA", "LA", "P"):
        picture = picture.convert("RGBA")
        background = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(background, picture)
    picture = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(1, SIDE, SIDE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def classify(pictures: Sequence[Image.Image] | Tensor, classifier: Classifier | None = None) -> Confidences:
    """Return the confidences of the committed classifier, or of the one given, for PIL images or a tensor as `as_input`
    takes."""
    model = load_classifier() if classifier is None else classifier
    logits = [model(part) for part in as_input(pictures).split(256)]
    heads = {name: torch.cat([part[name] for part in logits]).softmax(-1) for name in logits[0]}
    return Confidences(heads["concept"], heads["style"], heads["gender"], model.classes)
