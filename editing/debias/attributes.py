"""What tells pictures of a woman doctor from those of a man doctor: any classifier of attributes, CLIP among them."""

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
        """Whether it can tell pictures of these prompts apart."""
        ...

    def attributes(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """How sure it is that each picture shows each prompt, (pictures, prompts) float32 on the CPU. Asked only for
        prompts that it tells apart."""
        ...


def find_attribute_classifier(classifier: Classifier, prompts: Sequence[str]) -> AttributeClassifier | None:
    """What of a classifier tells these prompts apart: the attributes that it knows besides, else its classes."""
    ways: list[AttributeClassifier] = [ClassAttributes(classifier)]
    if isinstance(classifier, AttributeClassifier):
        ways.insert(0, classifier)
    return next((way for way in ways if way.can_distinguish(prompts)), None)


@dataclass(frozen=True)
class ClassAttributes:
    """The prompts are names of a classifier's classes, as in a balance of "cat" and "dog"."""

    classifier: Classifier

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        return len(set(prompts)) == len(prompts) and set(prompts) <= set(self.classifier.names)

    def attributes(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        return self.classifier.confidences(pictures, prompts)


@dataclass(frozen=True)
class ClipAttributes:
    """Zero-shot by CLIP: the softmax, over the prompts, of its scaled cosines. It tells any prompts apart."""

    clip: Clip

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        return len(set(prompts)) == len(prompts)

    def attributes(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        cosines = self.clip.embed_pictures(pictures) @ self.clip.embed_texts(prompts).T  # (pictures, prompts)
        return (self.clip.scale * cosines).softmax(-1).cpu()
