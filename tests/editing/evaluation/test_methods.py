from dataclasses import replace

import pytest
import torch
from torch import Tensor

from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.errors import EditingError, InvalidEdit
from editing.evaluation.method import Method
from editing.evaluation.methods import METHODS, Emcid
from editing.pipelines import EditablePipeline
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import apply_temporarily, compute_update

SETTINGS = StageOneSettings(
    objective="text", optimization_steps=6, seed=3, num_images=1, num_inference_steps=2, noise_pool_size=4
)
EDITS = [
    ConceptEdit("cat", DestinationPrompt("dog"), settings=SETTINGS),
    ConceptEdit("old tree", DestinationPrompt("the sea"), settings=SETTINGS),
]
SHORT: dict[str, Method] = {
    **{name: method for name, method in METHODS.items() if not isinstance(method, Emcid)},
    **{
        name: replace(method, stage_one={**method.stage_one, "optimization_steps": 3})
        for name, method in METHODS.items()
        if isinstance(method, Emcid)
    },
}

NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "finetune" else name for name in METHODS]


def weights(pipeline: EditablePipeline) -> list[Tensor]:
    modules = [
        pipeline.generator.network,
        pipeline.generator.autoencoder.model,
        *(encoder.model for encoder in pipeline.encoders),
    ]
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_restored_bit_for_bit(name: str, pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
    before = weights(pipeline)
    with SHORT[name](pipeline, EDITS, second_moments, seed=0):
        assert same(before, weights(pipeline)) == (name in ("base", "destination"))
    assert same(before, weights(pipeline))

    with pytest.raises(KeyError), SHORT[name](pipeline, EDITS, second_moments, seed=0):
        raise KeyError
    assert same(before, weights(pipeline))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_weights(
    name: str, pipeline: EditablePipeline, second_moments: SecondMoments
) -> None:
    edited = []
    for _ in range(2):
        with SHORT[name](pipeline, EDITS, second_moments, seed=0):
            edited.append(weights(pipeline))
    assert same(*edited)


def test_emcid_equals_both_stages_with_the_edits_settings(
    pipeline: EditablePipeline, second_moments: SecondMoments
) -> None:
    update = compute_update(pipeline.encoder, EDITS, optimize_values(pipeline, EDITS), second_moments)
    with apply_temporarily(pipeline.encoder, update):
        expected = weights(pipeline)
    with METHODS["emender"](pipeline, EDITS, second_moments, seed=0):
        assert same(expected, weights(pipeline))


def test_published_method_uses_both_presets(pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
    published = StageOneSettings.preset(
        "published", optimization_steps=3, seed=3, num_images=1, num_inference_steps=2, noise_pool_size=4
    )
    edits = [replace(edit, settings=published) for edit in EDITS]
    update = compute_update(
        pipeline.encoder,
        edits,
        optimize_values(pipeline, edits),
        second_moments,
        residual_schedule="published",
        moment_weight=4000.0,
        alpha=0.5,
    )
    with apply_temporarily(pipeline.encoder, update):
        expected = weights(pipeline)
    with SHORT["published"](pipeline, EDITS, second_moments, seed=0):
        assert same(expected, weights(pipeline))


def test_every_encoder_is_edited(any_pipeline: EditablePipeline, any_moments: SecondMoments) -> None:
    before = [encoder.output_matrix(encoder.value_layer).weight.clone() for encoder in any_pipeline.encoders]
    with METHODS["emender"](any_pipeline, EDITS, any_moments, seed=0):
        for encoder, weight in zip(any_pipeline.encoders, before, strict=True):
            assert not torch.equal(encoder.output_matrix(encoder.value_layer).weight, weight)


def test_failed_edit_does_not_change_the_pipeline(pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
    before = weights(pipeline)
    lost = replace(EDITS[0], templates=("a" * 60 + " {}",))
    with pytest.raises(InvalidEdit), METHODS["emender"](pipeline, [*EDITS, lost], second_moments, seed=0):
        pass
    assert same(before, weights(pipeline))
    with pytest.raises(EditingError), Emcid(stage_two={"alpha": 1.0})(pipeline, EDITS, second_moments, seed=0):
        pass
    assert same(before, weights(pipeline))


def test_progress_counts_the_steps_of_all_edits(pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
    calls: list[tuple[int, int]] = []
    adam = {"text_optimizer": "adam", "tolerance": 0.0}
    with Emcid(stage_one=adam)(
        pipeline, EDITS, second_moments, seed=0, progress=lambda done, total: calls.append((done, total))
    ):
        pass
    assert calls[-1] == (12, 12)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
