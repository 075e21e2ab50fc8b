"""Image classifiers: what judges pictures by the names of classes."""

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from editing.errors import ClassifierUnusable

GROUP = "emender.classifiers"
"""Entry points by which a package adds a classifier: a function without arguments that returns one."""

_BATCH = 32


class Classifier(Protocol):
    @property
    def names(self) -> tuple[str, ...]:
        """Every class that it knows, each once."""
        ...

    def classify(self, pictures: Sequence[Image], classes: Sequence[str]) -> Tensor:
        """Return the confidence that each picture shows each of these classes, (pictures, classes) float32 on the CPU.

        It is the softmax over all classes that it knows. Raises `ClassifierUnusable` for an unknown class.
        """
        ...


def list_classifiers() -> tuple[str, ...]:
    """Return the names of the installed classifiers."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def open_classifier(name: str) -> Classifier:
    """Open an installed classifier."""
    (point,) = entry_points(group=GROUP, name=name)
    classifier: Classifier = point.load()()
    return classifier


class HuggingFaceClassifier:
    """An image-classification model of `transformers` with its image processor."""

    def __init__(self, model: Any, processor: Any, *, names: Sequence[str]) -> None:
        """`names` are the classes in the order of the logits. Raises `ClassifierUnusable` if they do not fit."""
        labels = model.config.num_labels
        if len(names) != labels:
            raise ClassifierUnusable(f"{len(names)} names for the {labels} classes of the classifier")
        self._indices = {name: index for index, name in enumerate(names)}
        if len(self._indices) != labels:
            repeated = sorted({name for name in names if list(names).count(name) > 1})
            raise ClassifierUnusable(f"two classes of the classifier have the name {repeated[0]!r}")
        self.model, self._processor = model, processor

    @classmethod
    def load(
        cls, source: str | Path, *, names: Sequence[str] | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """Load from a folder or the Hugging Face Hub: only safetensors, and no code of the repository.

        Classes have the model's labels unless `names` are given, in the order of its logits.
        """
        try:
            model = AutoModelForImageClassification.from_pretrained(
                source, use_safetensors=True, trust_remote_code=False
            )
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, backend="pil")
        except (OSError, ValueError) as error:
            raise ClassifierUnusable(f"{source} is no image classifier that can be loaded: {error}") from error
        labels = model.config.id2label
        own = [labels[index] for index in range(len(labels))]
        return cls(model.eval().requires_grad_(False).to(device), processor, names=own if names is None else names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._indices)

    @torch.no_grad()
    def classify(self, pictures: Sequence[Image], classes: Sequence[str]) -> Tensor:
        indices = [self._find_class(name) for name in classes]
        parts = [torch.empty(0, len(indices))]
        for start in range(0, len(pictures), _BATCH):
            chunk = [picture.convert("RGB") for picture in pictures[start : start + _BATCH]]
            pixels = self._processor(chunk, return_tensors="pt").pixel_values.to(self.model.device)
            logits = self.model(pixels).logits  # (b, all classes)
            parts.append(logits.float().softmax(-1)[:, indices].cpu())
        return torch.cat(parts)

    def _find_class(self, name: str) -> int:
        if name not in self._indices:
            raise ClassifierUnusable(f"the classifier knows no class {name!r}")
        return self._indices[name]
