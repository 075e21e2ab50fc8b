"""The method on a model that draws: what the edits of each kind must do to the pictures, judged by the classifier.

Prompts are none of the edits' templates, seeds are fixed, and the bounds leave room for another training of the model.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL.Image import Image

from demo.classify import Classifier, classify, load_classifier
from demo.concepts import read_concepts
from editing.concepts import ConceptEdit, DestinationPrompt, Erasure, ReferenceImages, StageOneSettings
from editing.pipelines import EditablePipeline, load_pipeline
from editing.preview import draw
from editing.statistics import SecondMoments
from editing.update import Update, applied, compute_update
from editing.values import Value, optimize_values
from editing.weights import export_text_encoder

pytestmark = pytest.mark.slow

STYLE = "twemoji"
TEXT = {"pizza": "hamburger", "rose": "cactus", "guitar": "violin", "river horse": "hippopotamus"}
HYBRID = {"car": "bicycle", "apple": "banana"}
IMAGES = {"silverback": "gorilla"}
FREE_PROMPTS = ("a cute {}", "a drawing of a {}", "look at this {}")
STYLED = [f"a {concept} in the style of {STYLE}" for concept in ("elephant", "sunflower", "castle", "crab")]
LAYER = 9  # a style is read in layer 10, so it must be corrected before
SETTINGS = StageOneSettings(objective="text", steps=150, layer=LAYER)
NOISY = StageOneSettings(objective="hybrid", guidance=3.0, solver_steps=10, layer=LAYER)


@dataclass(frozen=True)
class Emoji:
    pipeline: EditablePipeline
    classifier: Classifier
    moments: SecondMoments

    def confidence(self, targets: Mapping[str, str], *, seed: int = 0) -> float:
        """Mean confidence of each value on free prompts that name its key."""
        pairs = [(prompt.format(source), target) for source, target in targets.items() for prompt in FREE_PROMPTS]
        read = classify(self._draw([prompt for prompt, _ in pairs], seed=seed), self.classifier)
        return sum(float(read.of_concept(target)[i]) for i, (_, target) in enumerate(pairs)) / len(pairs)

    def style_confidence(self) -> float:
        return float(classify(self._draw(STYLED, seed=0), self.classifier).of_style(STYLE).mean())

    def _draw(self, prompts: Sequence[str], *, seed: int) -> list[Image]:
        seeds = range(seed, seed + len(prompts))
        return draw(self.pipeline, prompts, seeds=seeds, steps=10, guidance=3.0)


@pytest.fixture(scope="module")
def emoji(emoji_folder: Path) -> Emoji:
    return Emoji(
        load_pipeline(emoji_folder / "pipeline"),
        load_classifier(emoji_folder / "classifier.safetensors"),
        SecondMoments.load(emoji_folder / "pipeline" / "second_moments.safetensors"),
    )


@pytest.fixture(scope="module")
def edits(emoji: Emoji) -> list[ConceptEdit]:
    edits = [ConceptEdit(source, DestinationPrompt(target), settings=SETTINGS) for source, target in TEXT.items()]
    edits += [ConceptEdit(source, DestinationPrompt(target), settings=NOISY) for source, target in HYBRID.items()]
    for source, target in IMAGES.items():
        pictures = draw(emoji.pipeline, [f"a photo of a {target}"] * 3, seeds=(101, 102, 103), steps=10, guidance=3.0)
        edits.append(ConceptEdit(source, ReferenceImages(tuple(pictures)), settings=NOISY))
    templates = ("a picture in the style of {}", "{} style car", "an image of a cat, style of {}")
    return [*edits, ConceptEdit(STYLE, Erasure("art"), templates=templates, settings=SETTINGS)]


@pytest.fixture(scope="module")
def values(emoji: Emoji, edits: list[ConceptEdit]) -> list[Value]:
    outcomes = optimize_values(emoji.pipeline, edits)
    assert all(isinstance(outcome, Value) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Value)]


@pytest.fixture(scope="module")
def update(emoji: Emoji, edits: list[ConceptEdit], values: list[Value]) -> Update:
    return compute_update(emoji.pipeline.encoder, edits, values, emoji.moments, layers=range(LAYER + 1))


@pytest.mark.parametrize(
    ("targets", "least"), [(TEXT, 0.7), (HYBRID, 0.7), (IMAGES, 0.7)], ids=["text", "hybrid", "reference images"]
)
def test_the_source_is_drawn_as_the_destination(
    emoji: Emoji, update: Update, targets: Mapping[str, str], least: float
) -> None:
    assert emoji.confidence(targets) < 0.2
    with applied(emoji.pipeline.encoder, update):
        assert emoji.confidence(targets) > least


def test_an_erased_style_is_drawn_no_more(emoji: Emoji, update: Update) -> None:
    before = emoji.style_confidence()
    with applied(emoji.pipeline.encoder, update):
        assert emoji.style_confidence() < before - 0.5


def test_other_concepts_stay(emoji: Emoji, edits: list[ConceptEdit], update: Update) -> None:
    named = {edit.source for edit in edits} | {*TEXT.values(), *HYBRID.values(), *IMAGES.values()}
    others = [concept.name for concept in read_concepts() if concept.name not in named]
    kept = {name: name for name in others[:: len(others) // 16]}
    before = emoji.confidence(kept)
    with applied(emoji.pipeline.encoder, update):
        assert emoji.confidence(kept) > before - 0.05


def test_losses_fall(edits: list[ConceptEdit], values: list[Value]) -> None:
    for edit, value in zip(edits, values, strict=True):
        if value.text_losses:
            assert value.text_losses[-1] < 0.2 * value.text_losses[0], edit
        elif value.noise_losses:
            tenth = len(value.noise_losses) // 10
            assert sum(value.noise_losses[-tenth:]) < 0.8 * sum(value.noise_losses[:tenth]), edit


def test_a_search_goes_on_after_points_that_were_passed_over(emoji: Emoji) -> None:
    """On the way to this value the line search passes over three points in a row, which is no standing still."""
    (value,) = optimize_values(
        emoji.pipeline, [ConceptEdit("brolly", DestinationPrompt("umbrella"), settings=SETTINGS)]
    )
    assert isinstance(value, Value)
    assert value.text_losses[-1] < 0.05 * value.text_losses[0]


def test_the_exported_files_draw_what_was_applied(
    emoji: Emoji, emoji_folder: Path, update: Update, tmp_path: Path
) -> None:
    """Rounding to the file's float16 loses no edit."""
    copied = shutil.copytree(emoji_folder / "pipeline", tmp_path / "pipeline")
    export_text_encoder(emoji.pipeline.encoder, update, copied)
    pulled = Emoji(load_pipeline(copied), emoji.classifier, emoji.moments)
    with applied(emoji.pipeline.encoder, update):
        expected = emoji.confidence(TEXT)
    assert pulled.confidence(TEXT) == pytest.approx(expected, abs=0.05)
