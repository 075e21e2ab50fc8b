"""The method on a model that draws: what the edits of each kind must do to the pictures, judged by the classifier.

Prompts are none of the edits' templates, seeds are fixed, and the bounds leave room for another training of the model.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from demo.concepts import read_concepts
from demo.emoji import Emoji
from editing.edits import ConceptEdit, DestinationPrompt, Erasure, ReferenceImages, StageOneSettings
from editing.pipelines import load_pipeline
from editing.stage_two.update import Update, apply_temporarily, compute_update
from editing.values import EditValue
from editing.weights import export_text_encoder

pytestmark = pytest.mark.slow

STYLE = "twemoji"
TEXT = {"pizza": "hamburger", "rose": "cactus", "guitar": "violin", "river horse": "hippopotamus"}
HYBRID = {"car": "bicycle", "apple": "banana"}
IMAGES = {"silverback": "gorilla"}
FREE_PROMPTS = ("a cute {}", "a drawing of a {}", "look at this {}")
STYLED = [f"a {concept} in the style of {STYLE}" for concept in ("elephant", "sunflower", "castle", "crab")]
LAYER = 9  # a style is read in layer 10, so it must be corrected before
SETTINGS = StageOneSettings(objective="text", optimization_steps=150, layer=LAYER)
NOISY = StageOneSettings(objective="hybrid", guidance_scale=3.0, num_inference_steps=10, layer=LAYER)


def confidence(emoji: Emoji, targets: Mapping[str, str]) -> float:
    """Mean confidence of each value on free prompts that name its key."""
    pairs = [(prompt.format(source), target) for source, target in targets.items() for prompt in FREE_PROMPTS]
    read = emoji.read([prompt for prompt, _ in pairs], range(len(pairs)))
    return sum(float(read.of_concept(target)[i]) for i, (_, target) in enumerate(pairs)) / len(pairs)


def style_confidence(emoji: Emoji) -> float:
    return float(emoji.read(STYLED, range(len(STYLED))).of_style(STYLE).mean())


@pytest.fixture(scope="module")
def emoji(emoji_folder: Path) -> Emoji:
    return Emoji.load(emoji_folder)


@pytest.fixture(scope="module")
def edits(emoji: Emoji) -> list[ConceptEdit]:
    edits = [ConceptEdit(source, DestinationPrompt(target), settings=SETTINGS) for source, target in TEXT.items()]
    edits += [ConceptEdit(source, DestinationPrompt(target), settings=NOISY) for source, target in HYBRID.items()]
    for source, target in IMAGES.items():
        pictures = emoji.draw([f"a photo of a {target}"] * 3, (101, 102, 103))
        edits.append(ConceptEdit(source, ReferenceImages(tuple(pictures)), settings=NOISY))
    templates = ("a picture in the style of {}", "{} style car", "an image of a cat, style of {}")
    return [*edits, ConceptEdit(STYLE, Erasure("art"), templates=templates, settings=SETTINGS)]


@pytest.fixture(scope="module")
def values(emoji: Emoji, edits: list[ConceptEdit]) -> list[EditValue]:
    return emoji.values(edits)


@pytest.fixture(scope="module")
def update(emoji: Emoji, edits: list[ConceptEdit], values: list[EditValue]) -> Update:
    return compute_update(emoji.pipeline.encoder, edits, values, emoji.moments)


@pytest.mark.parametrize(
    ("targets", "least"), [(TEXT, 0.7), (HYBRID, 0.7), (IMAGES, 0.7)], ids=["text", "hybrid", "reference images"]
)
def test_source_is_drawn_as_the_destination(
    emoji: Emoji, update: Update, targets: Mapping[str, str], least: float
) -> None:
    assert confidence(emoji, targets) < 0.2
    with apply_temporarily(emoji.pipeline.encoder, update):
        assert confidence(emoji, targets) > least


def test_erased_style_is_not_drawn(emoji: Emoji, update: Update) -> None:
    before = style_confidence(emoji)
    with apply_temporarily(emoji.pipeline.encoder, update):
        assert style_confidence(emoji) < before - 0.5


def test_other_concepts_do_not_change(emoji: Emoji, edits: list[ConceptEdit], update: Update) -> None:
    named = {edit.source for edit in edits} | {*TEXT.values(), *HYBRID.values(), *IMAGES.values()}
    others = [concept.name for concept in read_concepts() if concept.name not in named]
    kept = {name: name for name in others[:: len(others) // 16]}
    before = confidence(emoji, kept)
    with apply_temporarily(emoji.pipeline.encoder, update):
        assert confidence(emoji, kept) > before - 0.05


def test_losses_fall(edits: list[ConceptEdit], values: list[EditValue]) -> None:
    for edit, value in zip(edits, values, strict=True):
        if value.text_losses:
            assert value.text_losses[-1] < 0.2 * value.text_losses[0], edit
        elif value.noise_losses:
            tenth = len(value.noise_losses) // 10
            assert sum(value.noise_losses[-tenth:]) < 0.8 * sum(value.noise_losses[:tenth]), edit


def test_optimization_continues_after_rejected_points(emoji: Emoji) -> None:
    """On the way to this value the line search passes over three points in a row, which is no standing still."""
    (value,) = emoji.values([ConceptEdit("brolly", DestinationPrompt("umbrella"), settings=SETTINGS)])
    assert value.text_losses[-1] < 0.05 * value.text_losses[0]


@pytest.mark.parametrize("source, target", [("tablet", "pill"), ("sedan", "car"), ("succulent", "cactus")])
def test_stalled_optimization_restarts(emoji: Emoji, source: str, target: str) -> None:
    """From a first step of ‖h‖ each of these ends on a plateau, with four fifths of its loss left or more."""
    settings = StageOneSettings(objective="text")
    (value,) = emoji.values([ConceptEdit(source, DestinationPrompt(target), settings=settings)])
    assert value.text_losses[-1] < 0.05 * value.text_losses[0]


def test_exported_files_draw_the_same_pictures(
    emoji: Emoji, emoji_folder: Path, update: Update, tmp_path: Path
) -> None:
    """Rounding to the file's float16 loses no edit."""
    copied = shutil.copytree(emoji_folder / "pipeline", tmp_path / "pipeline")
    export_text_encoder(emoji.pipeline.encoder, update, copied)
    pulled = Emoji(load_pipeline(copied), emoji.classifier, emoji.moments)
    with apply_temporarily(emoji.pipeline.encoder, update):
        expected = confidence(emoji, TEXT)
    assert confidence(pulled, TEXT) == pytest.approx(expected, abs=0.05)
