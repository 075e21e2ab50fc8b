"""UCE on a model that draws, judged by the classifier: what a few edits reach and what they cost others.

Seeds are fixed, the prompts are none of the edits' templates, and the bounds leave room for another training.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from demo.classify import Classifier, classify, load_classifier
from demo.concepts import read_concepts
from editing.edits import Balance, ConceptEdit, DestinationPrompt, Erasure
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline, load_pipeline
from editing.uce.projections import apply_temporarily, compute_projection_update

pytestmark = pytest.mark.slow

TARGETS = {"pizza": "hamburger", "rose": "cactus"}
FREE_PROMPTS = ("a cute {}", "look at this {}")


@pytest.fixture(scope="module")
def emoji(emoji_folder: Path) -> EditablePipeline:
    return load_pipeline(emoji_folder / "pipeline")


@pytest.fixture(scope="module")
def classifier(emoji_folder: Path) -> Classifier:
    return load_classifier(emoji_folder / "classifier.safetensors")


@pytest.fixture(scope="module")
def others() -> list[str]:
    names = [concept.name for concept in read_concepts() if concept.skew is None]
    return [name for name in names if name not in {*TARGETS, *TARGETS.values(), "guitar", "violin"}]


def confidence(pipeline: EditablePipeline, classifier: Classifier, targets: Mapping[str, str]) -> float:
    """Mean confidence of each value on free prompts that name its key."""
    pairs = [(prompt.format(source), target) for source, target in targets.items() for prompt in FREE_PROMPTS]
    pictures = draw_pictures(
        pipeline, [prompt for prompt, _ in pairs], seeds=range(len(pairs)), num_inference_steps=8, guidance_scale=3.0
    )
    read = classify(pictures, classifier)
    return sum(float(read.of_concept(target)[i]) for i, (_, target) in enumerate(pairs)) / len(pairs)


def test_sources_are_drawn_as_destinations_and_others_do_not_change(
    emoji: EditablePipeline, classifier: Classifier, others: list[str]
) -> None:
    held_out = {name: name for name in others[1 :: len(others) // 12]}
    preserve = [f"an image of a {name}" for name in others if name not in held_out][::2]
    edits = [ConceptEdit(source, DestinationPrompt(target)) for source, target in TARGETS.items()]
    before = confidence(emoji, classifier, held_out)
    assert confidence(emoji, classifier, TARGETS) < 0.1
    update = compute_projection_update(emoji, edits, preserve=preserve, preserve_scale=1.0, regularization_weight=100.0)
    with apply_temporarily(emoji.generator, update):
        reached, kept = confidence(emoji, classifier, TARGETS), confidence(emoji, classifier, held_out)
    assert reached > 0.8
    assert kept > before - 0.05


def test_erased_concept_is_not_drawn(emoji: EditablePipeline, classifier: Classifier) -> None:
    assert confidence(emoji, classifier, {"guitar": "guitar"}) > 0.8
    update = compute_projection_update(emoji, [ConceptEdit("guitar", Erasure())], regularization_weight=100.0)
    with apply_temporarily(emoji.generator, update):
        assert confidence(emoji, classifier, {"guitar": "guitar"}) < 0.2


def test_balance_follows_its_weights(emoji: EditablePipeline, classifier: Classifier) -> None:
    def violins(weight: float) -> float:
        balance = Balance({"violin": weight, "cactus": 1 - weight})
        update = compute_projection_update(emoji, [ConceptEdit("guitar", balance)], regularization_weight=100.0)
        with apply_temporarily(emoji.generator, update):
            return confidence(emoji, classifier, {"guitar": "violin"})

    assert violins(0.95) > violins(0.05) + 0.5
