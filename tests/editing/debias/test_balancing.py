"""Algorithm 1 on a random pipeline, with a scripted classifier."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from editing.debias.balancing import DebiasProgress, DebiasResult, DebiasSettings, debias
from editing.edits import Balance, ConceptEdit, DestinationPrompt, StageOneSettings
from editing.errors import Cancelled, EditingError, InvalidEdit
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import apply_temporarily, compute_update
from editing.values import EditValue, mix
from tests.editing.conftest import CAPTIONS

TEXT = StageOneSettings(objective="text", optimization_steps=10)
CAT = ConceptEdit("cat", Balance({"dog": 1, "fish": 1}), settings=TEXT)
BOAT = ConceptEdit("small boat", Balance({"red hat": 3, "the sea": 1}), settings=TEXT)
QUICK = DebiasSettings(rounds=3, pictures=4, num_inference_steps=2, templates=("{}", "one {}"))

Search = Callable[..., list[DebiasResult]]


class ScriptedClassifier:
    """Finds the first prompt in a given number of the pictures of each call, and stores the pictures."""

    def __init__(self, *counts: int, knows: bool = True) -> None:
        self.counts, self.known = list(counts), knows
        self.pictures: list[list[bytes]] = []

    def can_distinguish(self, prompts: Sequence[str]) -> bool:
        return self.known

    def classify_attributes(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        self.pictures.append([picture.tobytes() for picture in pictures])
        first = self.counts.pop(0)
        probabilities = torch.full((len(pictures), len(prompts)), 0.1)
        probabilities[:first, 0] = 0.9
        probabilities[first:, 1] = 0.9
        return probabilities


@pytest.fixture(scope="module")
def values(pipeline: EditablePipeline) -> list[EditValue]:
    return cast(list[EditValue], optimize_values(pipeline, [CAT, BOAT]))


@pytest.fixture
def one(pipeline: EditablePipeline, values: list[EditValue], second_moments: SecondMoments) -> Search:
    """Debias the cat, or both edits."""

    def run(
        classifier: ScriptedClassifier, *, both: bool = False, settings: DebiasSettings = QUICK, **rest: Any
    ) -> list[DebiasResult]:
        count = 2 if both else 1
        edits = [CAT, BOAT][:count]
        return debias(pipeline, edits, values[:count], [second_moments], classifier, settings=settings, **rest)

    return run


def test_factors_move_against_the_difference(one: Search) -> None:
    """η is 0.4, then 0.4 · 2/3."""
    (found,) = one(ScriptedClassifier(4, 3, 4))
    factors = [list(each.factors.values()) for each in found.rounds]
    assert factors[0] == [0.5, 0.5]
    assert factors[1] == pytest.approx([0.5 - 0.4 * 0.5, 0.5 + 0.4 * 0.5])
    assert factors[2] == pytest.approx([0.3 - 0.8 / 3 * 0.25, 0.7 + 0.8 / 3 * 0.25])
    assert [list(each.shares.values()) for each in found.rounds] == [[1, 0], [0.75, 0.25], [1, 0]]
    assert [each.difference for each in found.rounds] == [0.5, 0.25, 0.5]


def test_factors_are_never_negative_and_sum_to_one(one: Search) -> None:
    (found,) = one(
        ScriptedClassifier(4, 4, 0), settings=DebiasSettings(rounds=3, pictures=4, num_inference_steps=1, step=4.0)
    )
    assert [list(each.factors.values()) for each in found.rounds] == [[0.5, 0.5], [0, 1], [0, 1]]


def test_rounds_end_when_the_shares_are_reached(one: Search) -> None:
    (found,) = one(ScriptedClassifier(3, 2))
    assert len(found.rounds) == 2 and found.chosen == 1 and found.converged
    assert found.shares == {"dog": 0.5, "fish": 0.5}


def test_best_round_counts_if_none_reaches_the_shares(one: Search) -> None:
    (found,) = one(ScriptedClassifier(4, 1, 0))
    assert found.chosen == 1 and not found.converged
    mixed = mix(found.value.attributes, [*found.rounds[1].factors.values()])
    assert found.value.to_safetensors() == mixed.to_safetensors()


def test_edit_that_reached_its_shares_keeps_its_mixture(one: Search) -> None:
    """The boat's desired shares are three to one. Calls: cat, boat, cat, boat."""
    cat, boat = one(ScriptedClassifier(2, 0, 2, 3), both=True)
    assert [list(each.factors.values()) for each in cat.rounds] == [[0.5, 0.5], [0.5, 0.5]]
    assert list(boat.rounds[1].factors.values()) == pytest.approx([0.5 + 0.4 * 0.75, 0.5 - 0.4 * 0.75])
    assert cat.chosen == boat.chosen == 1 and cat.converged and boat.converged


def test_round_in_which_all_shares_are_reached_wins(one: Search) -> None:
    loose = DebiasSettings(rounds=2, pictures=20, num_inference_steps=1, tolerance=0.1)
    cat, boat = one(ScriptedClassifier(10, 18, 12, 17), both=True, settings=loose)
    assert [each.difference for each in cat.rounds] == pytest.approx([0, 0.1])
    assert [each.difference for each in boat.rounds] == pytest.approx([0.15, 0.1])
    assert cat.chosen == boat.chosen == 1 and cat.converged and boat.converged


def test_pictures_are_those_of_the_edited_model(
    one: Search,
    pipeline: EditablePipeline,
    values: list[EditValue],
    second_moments: SecondMoments,
) -> None:
    """Both edits are applied with the mixtures of the round, and the seeds are those of the settings."""
    classifier = ScriptedClassifier(4, 4, 4, 4)
    settings = DebiasSettings(rounds=2, pictures=2, num_inference_steps=2, seed=7, templates=("{}", "one {}"))
    found = one(classifier, both=True, settings=settings)
    for number in range(2):
        mixed = [mix(each.value.attributes, [*each.rounds[number].factors.values()]) for each in found]
        update = compute_update(pipeline.encoder, [CAT, BOAT], mixed, second_moments)
        with apply_temporarily(pipeline.encoder, update):
            pictures = draw_pictures(pipeline, ["cat", "one cat"], seeds=(7, 8), num_inference_steps=2)
        assert classifier.pictures[2 * number] == [picture.tobytes() for picture in pictures]
    assert classifier.pictures[0] != classifier.pictures[2]


def test_pipeline_is_restored_and_rounds_can_be_repeated(one: Search, pipeline: EditablePipeline) -> None:
    before = {layer: pipeline.encoder.output_matrix(layer).weight.clone() for layer in range(3)}
    first, again = (one(classifier := ScriptedClassifier(4, 1, 0))[0].value.to_safetensors() for _ in range(2))
    assert all(pipeline.encoder.output_matrix(layer).weight.equal(weight) for layer, weight in before.items())
    assert first == again and classifier.counts == []


def test_cancellation_restores_the_weights(one: Search, pipeline: EditablePipeline) -> None:
    before = pipeline.encoder.output_matrix(0).weight.clone()
    classifier = ScriptedClassifier(4, 4, 4, 4)
    with pytest.raises(Cancelled):
        one(classifier, both=True, cancelled=lambda: len(classifier.pictures) == 3)
    assert len(classifier.pictures) == 3 and pipeline.encoder.output_matrix(0).weight.equal(before)


def test_progress_is_reported_after_the_pictures_of_each_edit(one: Search) -> None:
    reported: list[DebiasProgress] = []
    found = one(ScriptedClassifier(4, 0, 2, 3), both=True, progress=reported.append)
    assert [(each.round, each.edit_index) for each in reported] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert reported[3].result == found[1].rounds[1] and reported[3].rounds == 3


def test_both_encoders_of_sdxl_are_edited(sdxl: EditablePipeline) -> None:
    (value,) = cast(list[EditValue], optimize_values(sdxl, [CAT]))
    moments = [estimate_second_moments(encoder, CAPTIONS) for encoder in sdxl.encoders]
    classifier = ScriptedClassifier(2)
    (found,) = debias(
        sdxl, [CAT], [value], moments, classifier, settings=DebiasSettings(rounds=1, pictures=2, num_inference_steps=1)
    )
    assert list(found.value.encoders) == [encoder.name for encoder in sdxl.encoders]
    first, second = (
        compute_update(encoder, [CAT], [found.value], own) for encoder, own in zip(sdxl.encoders, moments, strict=True)
    )
    prompts = ["An image of cat", "A photo of cat"]
    with apply_temporarily(sdxl.encoders[0], first), apply_temporarily(sdxl.encoders[1], second):
        pictures = draw_pictures(sdxl, prompts, seeds=(0, 1), num_inference_steps=1)
    assert classifier.pictures[0] == [picture.tobytes() for picture in pictures]


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "pointer"),
        [
            ({"rounds": 0}, "/rounds"),
            ({"pictures": 0}, "/pictures"),
            ({"step": 0.0}, "/step"),
            ({"tolerance": -0.1}, "/tolerance"),
            ({"templates": ("no placeholder",)}, "/templates/0"),
        ],
    )
    def test_invalid_setting_is_named(self, settings: dict[str, Any], pointer: str) -> None:
        with pytest.raises(EditingError) as raised:
            DebiasSettings(**settings)
        assert raised.value.pointer == pointer

    def test_other_destination_is_refused(
        self, pipeline: EditablePipeline, values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        edit = ConceptEdit("cat", DestinationPrompt("dog"), settings=TEXT)
        with pytest.raises(InvalidEdit) as raised:
            debias(pipeline, [CAT, edit], values, [second_moments], ScriptedClassifier())
        assert raised.value.pointer == "/edits/1/destination"

    def test_value_without_attributes_is_refused(
        self, pipeline: EditablePipeline, values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        read = EditValue.from_safetensors(values[0].to_safetensors())
        with pytest.raises(InvalidEdit, match="optimize the edit again") as raised:
            debias(pipeline, [CAT], [read], [second_moments], ScriptedClassifier())
        assert raised.value.pointer == "/edits/0"

    def test_prompts_that_cannot_be_distinguished_are_refused(self, one: Search) -> None:
        with pytest.raises(InvalidEdit) as raised:
            one(ScriptedClassifier(knows=False))
        assert raised.value.pointer == "/edits/0/destination/balance"
