"""What judges pictures: anything that says how sure it is of a named class."""

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
"""Of the entry points by which a package brings a classifier: a function without arguments that returns one."""

_BATCH = 32


class Classifier(Protocol):
    """Judges pictures by the names of classes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every class that it knows, each once."""
        ...

    def confidences(self, pictures: Sequence[Image], classes: Sequence[str]) -> Tensor:
        """How sure it is that each picture shows each of these classes: softmax over all that it knows, (pictures,
        classes) float32 on the CPU. Raises `ClassifierUnusable` for a class that it does not know."""
        ...


def list_classifiers() -> tuple[str, ...]:
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def open_classifier(name: str) -> Classifier:
    """One of `list_classifiers`."""
    (point,) = entry_points(group=GROUP, name=name)
    classifier: Classifier = point.load()()
    return classifier


class HuggingFaceClassifier:
    """An image-classification model of `transformers`, with the image processor that lies beside it."""

    def __init__(self, model: Any, processor: Any, *, names: Sequence[str]) -> None:
        """`names` of the classes in the order of the logits. Raises `ClassifierUnusable` where they are too few, too
        many or not distinct."""
        labels = model.config.num_labels
        if len(names) != labels:
            raise ClassifierUnusable(f"{len(names)} names for the classifier's {labels} classes")
        self._places = {name: place for place, name in enumerate(names)}
        if len(self._places) != labels:
            twice = sorted({name for name in names if list(names).count(name) > 1})
            raise ClassifierUnusable(f"two classes of the classifier have the name {twice[0]!r}")
        self.model, self._processor = model, processor

    @classmethod
    def load(
        cls, source: str | Path, *, names: Sequence[str] | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """From a folder or the Hugging Face Hub: safetensors only, no code of the repository's own is run. Classes
        have the model's own labels unless `names` are given, in the order of its logits."""
        try:
            model = AutoModelForImageClassification.from_pretrained(
                source, use_safetensors=True, trust_remote_code=False
            )
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, backend="pil")
        except (OSError, ValueError) as error:
            raise ClassifierUnusable(f"{source} is no image classifier that can be loaded: {error}") from error
        labels = model.config.id2label
        own = [labels[place] for place in range(len(labels))]
        return cls(model.eval().requires_grad_(False).to(device), processor, names=own if names is None else names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    @torch.no_grad()
    def confidences(self, pictures: Sequence[Image], classes: Sequence[str]) -> Tensor:
        places = [self._place(name) for name in classes]
        parts = [torch.empty(0, len(places))]
        for start in range(0, len(pictures), _BATCH):
            chunk = [picture.convert("RGB") for picture in pictures[start : start + _BATCH]]
            pixels = self._processor(chunk, return_tensors="pt").pixel_values.to(self.model.device)
            logits = self.model(pixels).logits  # (b, all classes)
            parts.append(logits.float().softmax(-1)[:, places].cpu())
        return torch.cat(parts)

    def _place(self, name: str) -> int:
        if name not in self._places:
            raise ClassifierUnusable(f"the classifier knows no class {name!r}")
        return self._places[name]
