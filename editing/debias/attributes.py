"""Classifiers that tell pictures of a woman doctor from those of a man doctor, or other attributes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

from editing.evaluation.classifiers import Classifier
from editing.evaluation.metrics import Clip


@runtime_checkable
class AttributeClassifier(Protocol):
    """Judges which of several prompts a picture shows."""

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        """Return whether it can tell pictures of these prompts apart."""
        ...

    def classify_attributes(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Return the confidence that each picture shows each prompt, (pictures, prompts) float32 on the CPU.

        It is called only with prompts that it can distinguish.
        """
        ...


def find_attribute_classifier(classifier: Classifier, prompts: Sequence[str]) -> AttributeClassifier | None:
    """Return what of a classifier distinguishes these prompts: its own attributes, else its classes, or None."""
    candidates: list[AttributeClassifier] = [ClassAttributes(classifier)]
    if isinstance(classifier, AttributeClassifier):
        candidates.insert(0, classifier)
    return next((candidate for candidate in candidates if candidate.can_distinguish(prompts)), None)


@dataclass(frozen=True)
class ClassAttributes:
    """The prompts are names of a classifier's classes, as in a balance of "cat" and "dog"."""

    classifier: Classifier

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        return len(set(prompts)) == len(prompts) and set(prompts) <= set(self.classifier.names)

    def classify_attributes(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        return self.classifier.classify(pictures, prompts)


@dataclass(frozen=True)
class ClipAttributes:
    """Zero-shot classification by CLIP: the softmax of its scaled cosines over the prompts. It takes any prompts."""

    clip: Clip

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        return len(set(prompts)) == len(prompts)

    def classify_attributes(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        cosines = self.clip.embed_pictures(pictures) @ self.clip.embed_texts(prompts).T  # (pictures, prompts)
        return (self.clip.scale * cosines).softmax(-1).cpu()
