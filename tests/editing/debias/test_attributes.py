"""CLIP as a classifier of attributes, on a small CLIP model with random weights."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from editing.debias.attributes import ClipAttributes, find_attribute_classifier
from editing.evaluation.metrics import Clip
from editing.prompts import PromptTokenizer
from tests.pipelines import write_clip

PROMPTS = ["man doctor", "woman doctor", "cat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 36), colour) for colour in ("red", "green", "black")] * 12


def test_confidences_equal_the_softmax_of_clips_own_logits(clip_folder: Path, pictures: list[Image.Image]) -> None:
    model = CLIPModel.from_pretrained(clip_folder)
    tokenizer = PromptTokenizer.from_folder(clip_folder)
    ids = torch.tensor([tokenizer.pad(tokenizer.encode(prompt).ids) for prompt in PROMPTS])
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image.softmax(1)
    found = ClipAttributes(Clip.from_folder(clip_folder)).classify_attributes(pictures, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.std(0).min() > 1e-6  # pictures and prompts both count


def test_columns_follow_the_prompts(clip_folder: Path, pictures: list[Image.Image]) -> None:
    clip = ClipAttributes(Clip.from_folder(clip_folder))
    there, back = clip.classify_attributes(pictures, PROMPTS), clip.classify_attributes(pictures, PROMPTS[::-1])
    torch.testing.assert_close(there, back.flip(1))


def test_equal_prompts_cannot_be_distinguished(clip_folder: Path) -> None:
    clip = ClipAttributes(Clip.from_folder(clip_folder))
    assert clip.can_distinguish(PROMPTS) and not clip.can_distinguish(["cat", "cat"])


class Classes:
    """Two classes: how red and how green a picture is."""

    names = ("red", "green")

    def classify(self, pictures: Sequence[Image.Image], classes: Sequence[str]) -> torch.Tensor:
        colours = torch.tensor([picture.getpixel((0, 0)) for picture in pictures]).float() / 255
        return colours[:, [self.names.index(name) for name in classes]]


class Attributes(Classes):
    """Knows an attribute besides."""

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        return set(prompts) == {"dark", "light"}

    def classify_attributes(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return torch.ones(len(pictures), len(prompts))


def test_class_names_are_distinguished_by_the_classes(pictures: list[Image.Image]) -> None:
    for classifier in (Classes(), Attributes()):
        judge = find_attribute_classifier(classifier, ["green", "red"])
        assert judge is not None
        assert judge.classify_attributes(pictures[:2], ["green", "red"]).argmax(1).tolist() == [1, 0]
    assert find_attribute_classifier(Classes(), ["red", "blue"]) is None
    assert find_attribute_classifier(Classes(), ["red", "red"]) is None


def test_attributes_of_the_classifier_come_first() -> None:
    classifier = Attributes()
    assert find_attribute_classifier(classifier, ["dark", "light"]) is classifier
    assert find_attribute_classifier(Classes(), ["dark", "light"]) is None
