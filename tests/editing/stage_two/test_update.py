"""Stage II: Eq. 14 over many layers, against a second implementation, and what holds bit for bit."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from editing.edits import Balance, ConceptEdit, DestinationPrompt, Erasure, fill_template
from editing.encoders.clip import ClipEncoder
from editing.errors import InvalidEdit, InvalidPrompt, OptimizationDiverged, SingularSecondMoment
from editing.pipelines import EditablePipeline
from editing.prompts import PromptTokenizer
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.contexts import AFTER_SUBJECT, AT_SUBJECT, EDIT_WEIGHT, PRESERVE_WEIGHT
from editing.stage_two.update import (
    ResidualSchedule,
    Update,
    apply_all_temporarily,
    apply_temporarily,
    apply_update,
    compute_update,
)
from editing.values import EditValue, EncoderValue
from tests.editing.conftest import CAPTIONS
from tests.editing.values import first, one_encoder

WIDTH, MLP_WIDTH, LAST = 32, 64, 2
MANY = [f"thing {letter}{other}" for letter in "abcdefghij" for other in "klmnopq"]  # more than MLP_WIDTH


@pytest.fixture
def encoder(pipeline: EditablePipeline) -> ClipEncoder:
    assert isinstance(pipeline.encoder, ClipEncoder)
    return pipeline.encoder


def weights_of(encoder: ClipEncoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}


def assert_equal(update: Update, other: Update) -> None:
    """Bit for bit."""
    assert update.layers.keys() == other.layers.keys()
    for layer, change in update.layers.items():
        assert torch.equal(change.a, other.layers[layer].a)
        assert torch.equal(change.b, other.layers[layer].b)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class TestAgainstPublished:
    @pytest.mark.parametrize("first", [0, 7])
    def test_relative_error(self, golden_folder: Path, first: int, capsys: pytest.CaptureFixture[str]) -> None:
        """ΔW in "published" mode, against weights that the released code made (float32 scaling of C0 and all)."""
        encoder = ClipEncoder(
            CLIPTextModel.from_pretrained(golden_folder / "model").requires_grad_(False).eval(),
            PromptTokenizer.from_folder(golden_folder / "model"),
        )
        requests = json.loads((golden_folder / "requests.json").read_text())
        edits = [ConceptEdit(r["source"], DestinationPrompt(r["dest"]), tuple(r["prompts"])) for r in requests]
        with np.load(golden_folder / "values.npz") as file:
            z = torch.from_numpy(file["v_star"])
        values = [one_encoder("text_encoder", 10, delta=row, hidden=torch.zeros_like(row)) for row in z]
        with np.load(golden_folder / "c0.npz") as file:
            moments = {layer: torch.from_numpy(file[f"layer_{layer}"]).double() for layer in range(12)}
        layers = list(range(first, 11))
        update = compute_update(
            encoder,
            edits,
            values,
            SecondMoments(moments, 0, 0),
            layers=layers,
            moment_weight=4000.0,
            residual_schedule="published",
        )
        with np.load(golden_folder / f"published_layers{first}-10_lambda4000_alpha0.5.npz") as file:
            published = [
                torch.from_numpy(file[f"text_model.encoder.layers.{layer}.mlp.fc2.weight"]) for layer in layers
            ]
        expected = torch.stack(
            [w.double() - encoder.output_matrix(i).weight.double() for i, w in zip(layers, published, strict=True)]
        )
        ours = torch.stack([update.to_dense(layer) for layer in layers])
        error = relative_error(ours, expected)
        with capsys.disabled():
            print(f"\nlayers {first}-10: relative error of ΔW against the published code {error:.1e}")  # noqa: T201
        assert error <= 2e-5


def written_out(
    encoder: ClipEncoder,
    edits: Sequence[ConceptEdit],
    values: Sequence[EditValue],
    moments: SecondMoments,
    *,
    alpha: float,
    moment_weight: float,
    layers: Sequence[int],
    residual_schedule: ResidualSchedule,
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    kept: Sequence[tuple[str, str]] = (),
    dtype: torch.dtype = torch.float64,
) -> dict[int, Tensor]:
    """The same mathematics the long way: full forward passes with hooks, weights changed in place, a plain inverse.

    `kept` are prompts that keep their value where the text beside each ends. `dtype` is the encoder's; the solve is
    float64.
    """
    kept = [*((prompt, prompt) for prompt in preserve), *kept]
    model = copy.deepcopy(encoder.model).to(dtype)
    model.embeddings = copy.deepcopy(encoder.embeddings)  # float32, as stage II reads them
    model.embeddings.register_forward_hook(lambda _, __, states: states.to(dtype))
    blocks: Any = model.get_submodule("encoder.layers")
    tokenizer = encoder.tokenizer

    def read(module: torch.nn.Module, prompt: str, subject: str, *, output: bool) -> Tensor:
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda _, inputs, result: seen.append(result if output else inputs[0]))
        before = prompt[: prompt.rindex(subject) + len(subject)]
        with torch.no_grad():
            model(torch.tensor([tokenizer.pad(tokenizer.encode(prompt).ids)]))
        hook.remove()
        return seen[0][0, len(tokenizer.encode(before).ids) - 2].double()

    def column(module: torch.nn.Module, edit: ConceptEdit, *, output: bool) -> Tensor:
        prompts = [template.format(edit.source) for template in edit.templates]
        return torch.stack([read(module, prompt, edit.source, output=output) for prompt in prompts]).mean(0)

    changes = {}
    z = torch.stack([first(value).hidden.double() + first(value).delta.double() for value in values], 1)
    delta = torch.stack([first(value).delta.double() for value in values], 1)
    for done, layer in enumerate(layers):
        fc2, left = blocks[layer].mlp.fc2, len(layers) - done
        k = torch.stack([column(fc2, edit, output=False) for edit in edits], 1)
        if residual_schedule == "spread":
            r = (z - torch.stack([column(blocks[layers[-1]], edit, output=True) for edit in edits], 1)) / left
        elif residual_schedule == "even":
            r = delta / len(layers)
        else:
            r = (z - torch.stack([column(fc2, edit, output=True) for edit in edits], 1)) / left
        c0 = moment_weight * moments.moments[layer]
        if kept:
            held = torch.stack([read(fc2, prompt, subject, output=False) for prompt, subject in kept], 1)
            c0 = c0 + preserve_weight * held @ held.T
        changes[layer] = alpha * r @ k.T @ torch.linalg.inv((1 - alpha) * c0 + alpha * k @ k.T)
        with torch.no_grad():
            fc2.weight += changes[layer].to(dtype)
    return changes


class TestClosedForm:
    @pytest.mark.parametrize("residual_schedule", ["spread", "even", "published"])
    @pytest.mark.parametrize(("alpha", "moment_weight", "layers"), [(0.5, 4000.0, (0, 1, 2)), (0.8, 1.0, (0, 2))])
    def test_update_equals_equation_14(
        self,
        encoder: ClipEncoder,
        edits: list[ConceptEdit],
        values: list[EditValue],
        second_moments: SecondMoments,
        residual_schedule: ResidualSchedule,
        alpha: float,
        moment_weight: float,
        layers: tuple[int, ...],
    ) -> None:
        options = {
            "alpha": alpha,
            "moment_weight": moment_weight,
            "layers": layers,
            "residual_schedule": residual_schedule,
        }
        update = compute_update(encoder, edits, values, second_moments, **options)  # type: ignore[arg-type]
        expected = written_out(encoder, edits, values, second_moments, **options)  # type: ignore[arg-type]
        for layer in layers:
            assert relative_error(update.to_dense(layer), expected[layer]) < 1e-6
            assert update.layers[layer].b.shape == (WIDTH, len(edits))
            assert update.layers[layer].a.shape == (MLP_WIDTH, len(edits))

    @pytest.mark.parametrize("residual_schedule", ["spread", "published"])
    def test_float32_encoder_agrees_to_rounding(
        self,
        encoder: ClipEncoder,
        edits: list[ConceptEdit],
        values: list[EditValue],
        second_moments: SecondMoments,
        residual_schedule: ResidualSchedule,
    ) -> None:
        update = compute_update(encoder, edits, values, second_moments, residual_schedule=residual_schedule)
        options = {"alpha": 0.5, "moment_weight": 1000.0, "layers": (0, 1, 2), "residual_schedule": residual_schedule}
        expected = written_out(encoder, edits, values, second_moments, dtype=torch.float32, **options)  # type: ignore[arg-type]
        assert max(relative_error(update.to_dense(layer), expected[layer]) for layer in (0, 1, 2)) <= 1e-4

    @pytest.mark.parametrize("count", [40, 70], ids=["woodbury", "dense"])
    def test_more_edits_than_the_width_of_the_states(
        self, encoder: ClipEncoder, second_moments: SecondMoments, count: int
    ) -> None:
        """Templates mixed, one glued to the subject; ΔW has no more columns than its rank can be."""
        templates = [("a photo of {}",), ("{}",), ("very{}",)]
        edits = [
            ConceptEdit(source, DestinationPrompt("dog"), templates[i % 3]) for i, source in enumerate(MANY[:count])
        ]
        drawn = torch.randn(count, 2, WIDTH, generator=torch.Generator().manual_seed(0))
        values = [one_encoder("text_encoder", LAST, delta=delta, hidden=hidden) for delta, hidden in drawn]
        options = {"alpha": 0.5, "moment_weight": 100.0, "layers": (1, 2), "residual_schedule": "spread"}
        update = compute_update(encoder, edits, values, second_moments, **options)  # type: ignore[arg-type]
        expected = written_out(encoder, edits, values, second_moments, **options)  # type: ignore[arg-type]
        for layer in (1, 2):
            assert relative_error(update.to_dense(layer), expected[layer]) < 1e-6
            assert update.layers[layer].a.shape == (MLP_WIDTH, WIDTH)

    def test_half_precision_weights_are_used_exactly(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        half = ClipEncoder(copy.deepcopy(encoder.model), encoder.tokenizer)
        for block in half.blocks:
            block.layer.half()
        single = ClipEncoder(copy.deepcopy(half.model), encoder.tokenizer)
        for block in single.blocks:
            block.layer.float()
        found = compute_update(half, edits, values, second_moments)
        assert_equal(found, compute_update(single, edits, values, second_moments))
        assert half.dtype == torch.float16

    @pytest.mark.parametrize("preserve", [("bird", "my cup of tea"), MANY], ids=["woodbury", "dense"])
    def test_preserved_keys_join_the_second_moments(
        self,
        encoder: ClipEncoder,
        edits: list[ConceptEdit],
        values: list[EditValue],
        second_moments: SecondMoments,
        preserve: Sequence[str],
    ) -> None:
        options = {
            "alpha": 0.6,
            "moment_weight": 10.0,
            "layers": (1, 2),
            "residual_schedule": "spread",
            "preserve_weight": 0.3,
        }
        update = compute_update(encoder, edits, values, second_moments, preserve=preserve, **options)  # type: ignore[arg-type]
        expected = written_out(encoder, edits, values, second_moments, preserve=preserve, **options)  # type: ignore[arg-type]
        for layer in (1, 2):
            assert relative_error(update.to_dense(layer), expected[layer]) < 1e-6
        assert (update.layers[1].moment_condition is None) == (len(preserve) >= MLP_WIDTH)

    def test_preserving_a_prompt_keeps_its_state(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        ids = [encoder.tokenizer.encode("red cat").ids]

        def moved(preserve: tuple[str, ...]) -> float:
            update = compute_update(
                encoder, edits, values, second_moments, moment_weight=1.0, preserve=preserve, preserve_weight=100.0
            )
            before = encoder.encode(ids).states
            with apply_temporarily(encoder, update):
                return float((encoder.encode(ids).states - before)[0, len(ids[0]) - 2].norm())

        assert moved(("red cat",)) < 0.5 * moved(())

    def test_many_contexts_are_columns_of_one_value(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        """The same as so many edits, one for each prompt, whose neighbors are preserved prompts; weighed together."""
        edits = [dataclasses.replace(edit, templates=("a photo of {}", "{}")) for edit in edits]
        preserve = ["bird", *(f"old {edit.source}" for edit in edits)]
        found = compute_update(
            encoder,
            edits,
            values,
            second_moments,
            contexts="many",
            moment_weight=10.0,
            layers=(1, 2),
            preserve=preserve,
        )
        templates = ("a photo of {}", "{}", *AT_SUBJECT)
        weight = EDIT_WEIGHT / len(templates)
        followed = [fill_template(context, edit.source) for edit in edits for context in AFTER_SUBJECT]
        around = (*AT_SUBJECT[::3], *AFTER_SUBJECT[::2])
        split = [dataclasses.replace(edit, templates=(template,)) for edit in edits for template in templates]
        expected = written_out(
            encoder,
            split,
            [value for value in values for _ in templates],
            second_moments,
            alpha=0.5,
            moment_weight=10.0 / weight,
            layers=(1, 2),
            residual_schedule="spread",
            preserve=[*preserve, *followed],
            preserve_weight=PRESERVE_WEIGHT / weight,
            kept=[(fill_template(c, f"old {e.source}"), f"old {e.source}") for e in edits for c in around],
        )
        for layer in (1, 2):
            assert relative_error(found.to_dense(layer), expected[layer]) < 1e-6
        assert len(found.relative_residuals) == len(edits)

    def test_spread_schedule_reaches_h_plus_delta(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        """With next to no weight on what is known, the mean state after L is h + δ, in the weights as applied."""
        update = compute_update(encoder, edits, values, second_moments, moment_weight=1e-9)
        assert max(update.relative_residuals) < 1e-3
        with apply_temporarily(encoder, update):
            for edit, value in zip(edits, values, strict=True):
                torch.testing.assert_close(
                    state_after(encoder, edit), first(value).hidden + first(value).delta, rtol=1e-2, atol=1e-2
                )

    def test_relative_residuals_are_those_of_the_applied_weights(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], update: Update
    ) -> None:
        with apply_temporarily(encoder, update):
            for edit, value, residual in zip(edits, values, update.relative_residuals, strict=True):
                wanted = first(value).hidden + first(value).delta
                left = (wanted - state_after(encoder, edit)).norm() / first(value).delta.norm()
                assert float(left) == pytest.approx(residual, rel=1e-3)
        assert all(0 < residual < 1 for residual in update.relative_residuals)

    def test_larger_alpha_leaves_smaller_residuals(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        factored = FactoredMoments(second_moments)
        residuals = [
            sum(compute_update(encoder, edits, values, factored, alpha=alpha).relative_residuals)
            for alpha in (0.1, 0.5, 0.9)
        ]
        assert residuals == sorted(residuals, reverse=True)


def state_after(encoder: ClipEncoder, edit: ConceptEdit) -> Tensor:
    """The mean state after layer L at the last subject token, (d,)."""
    positions = [encoder.tokenizer.locate(template, edit.source) for template in edit.templates]
    states = encoder.run_layers(encoder.embed(encoder.pad([p.ids for p in positions]).ids), start=0, stop=LAST + 1)
    return torch.stack([row[p.last_subject_index] for row, p in zip(states, positions, strict=True)]).mean(0)


class TestDeterminism:
    def test_order_of_edits_does_not_change_the_bits(
        self,
        encoder: ClipEncoder,
        edits: list[ConceptEdit],
        values: list[EditValue],
        second_moments: SecondMoments,
        update: Update,
    ) -> None:
        backwards = compute_update(encoder, edits[::-1], values[::-1], second_moments)
        assert_equal(update, backwards)
        assert backwards.relative_residuals == update.relative_residuals[::-1]

    def test_removing_an_edit_gives_the_bits_without_it(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        factored = FactoredMoments(second_moments)
        compute_update(encoder, edits, values, factored)
        without = compute_update(encoder, edits[1:], values[1:], factored)
        assert_equal(without, compute_update(encoder, edits[1:], values[1:], second_moments))

    def test_factors_from_a_folder_give_the_same_bits(
        self,
        encoder: ClipEncoder,
        edits: list[ConceptEdit],
        values: list[EditValue],
        second_moments: SecondMoments,
        update: Update,
        tmp_path: Path,
    ) -> None:
        second_moments.save(tmp_path / "moments.safetensors")
        for _ in ("computed", "read"):
            factored = FactoredMoments(tmp_path / "moments.safetensors", folder=tmp_path / "factors")
            found = compute_update(encoder, edits, values, factored)
            assert_equal(found, update)
            assert found.layers[1].moment_condition == update.layers[1].moment_condition
        assert len(list(tmp_path.rglob("text_encoder.layer_*.safetensors"))) == 3

    def test_preserved_prompts_are_a_set(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        once = compute_update(encoder, edits, values, second_moments, preserve=["bird", "fish"])
        assert_equal(once, compute_update(encoder, edits, values, second_moments, preserve=["fish", "bird", "fish"]))

    def test_encoder_is_not_changed(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        before = weights_of(encoder)
        compute_update(encoder, edits, values, second_moments)
        with pytest.raises(SingularSecondMoment):
            compute_update(encoder, edits, values, _singular(second_moments, layer=2))
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(encoder).items())

    def test_layers_default_to_those_up_to_the_values_layer(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        lower = [one_encoder("text_encoder", 1, first(value).delta, first(value).hidden) for value in values]
        found = compute_update(encoder, edits, lower, second_moments)
        assert tuple(found.layers) == (0, 1)
        assert_equal(found, compute_update(encoder, edits, lower, second_moments, layers=(0, 1)))

    def test_no_edits_change_nothing(self, encoder: ClipEncoder, second_moments: SecondMoments) -> None:
        update = compute_update(encoder, [], [], second_moments)
        assert (dict(update.layers), update.relative_residuals, update.conflicts) == ({}, (), ())


class TestApply:
    def test_weights_are_restored_bit_for_bit(self, encoder: ClipEncoder, update: Update) -> None:
        before = weights_of(encoder)
        with pytest.raises(RuntimeError, match="inside"), apply_temporarily(encoder, update):
            changed = {name for name, tensor in weights_of(encoder).items() if not torch.equal(tensor, before[name])}
            assert {name.removeprefix("text_model.") for name in changed} == {
                f"encoder.layers.{layer}.mlp.fc2.weight" for layer in (0, 1, 2)
            }
            raise RuntimeError("inside")
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(encoder).items())

    def test_updates_of_all_encoders_are_applied(self, encoder: ClipEncoder, update: Update) -> None:
        before = weights_of(encoder)
        with apply_all_temporarily([encoder], [update]):
            assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(encoder).items())
        with apply_all_temporarily([encoder], []):
            assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(encoder).items())
        with (
            pytest.raises(KeyError),
            apply_all_temporarily([encoder], [dataclasses.replace(update, encoder="text_encoder_2")]),
        ):
            pass

    def test_weights_are_rounded_once(self, encoder: ClipEncoder, update: Update) -> None:
        expected = (encoder.output_matrix(1).weight.double() + update.to_dense(1)).float()
        with apply_temporarily(encoder, update):
            assert torch.equal(encoder.output_matrix(1).weight, expected)

    def test_apply_update_stays(self, encoder: ClipEncoder, update: Update) -> None:
        twin = ClipEncoder(copy.deepcopy(encoder.model), encoder.tokenizer)
        apply_update(twin, update)
        with apply_temporarily(encoder, update):
            assert torch.equal(twin.output_matrix(0).weight, encoder.output_matrix(0).weight)


class TestConflicts:
    def test_edits_with_the_same_key_are_reported(
        self, encoder: ClipEncoder, values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        edits = [
            ConceptEdit("cat", DestinationPrompt("dog")),
            ConceptEdit("Cat ", DestinationPrompt("fish")),
            ConceptEdit("dog", Balance({"bird": 1, "fish": 1})),
            ConceptEdit("bird", Erasure()),
        ]
        update = compute_update(encoder, edits, [values[0]] * 4, second_moments)
        assert [(conflict.kind, conflict.edits) for conflict in update.conflicts if conflict.cosine is None] == [
            ("same source", (0, 1)),
            ("source is a destination", (2, 0)),
            ("source is a destination", (3, 2)),
        ]
        same = [conflict for conflict in update.conflicts if conflict.kind == "same key"]
        assert [conflict.edits for conflict in same] == [(0, 1)]
        assert same[0].cosine == pytest.approx(1.0)

    def test_different_edits_have_no_conflicts(self, update: Update) -> None:
        assert update.conflicts == ()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "pointer"),
        [
            ({"alpha": 0.0}, "/alpha"),
            ({"alpha": 1.0}, "/alpha"),
            ({"alpha": math.nan}, "/alpha"),
            ({"moment_weight": 0.0}, "/moment_weight"),
            ({"moment_weight": math.inf}, "/moment_weight"),
            ({"layers": ()}, "/layers"),
            ({"layers": (-1, 2)}, "/layers"),
            ({"layers": (2, 4)}, "/layers"),
            ({"layers": (0, 1)}, "/layers"),
            ({"residual_schedule": "all"}, "/residual_schedule"),
            ({"preserve_weight": 0.0}, "/preserve_weight"),
        ],
    )
    def test_invalid_argument_is_named(
        self,
        encoder: ClipEncoder,
        edits: list[ConceptEdit],
        values: list[EditValue],
        second_moments: SecondMoments,
        options: dict[str, object],
        pointer: str,
    ) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            compute_update(encoder, edits, values, second_moments, **options)  # type: ignore[arg-type]
        assert refusal.value.pointer == pointer

    @pytest.mark.parametrize(
        ("spoil", "pointer"),
        [
            (lambda own: one_encoder("text_encoder_2", 2, own.delta, own.hidden), "/edits/1"),
            (lambda own: one_encoder("text_encoder", 2, own.delta[:-1], own.hidden[:-1]), "/edits/1"),
            (lambda own: one_encoder("text_encoder", 2, own.delta * math.nan, own.hidden), "/edits/1"),
            (lambda own: one_encoder("text_encoder", 1, own.delta, own.hidden), "/layers"),
        ],
    )
    def test_value_that_does_not_fit_is_named(
        self,
        encoder: ClipEncoder,
        edits: list[ConceptEdit],
        values: list[EditValue],
        second_moments: SecondMoments,
        spoil: Callable[[EncoderValue], EditValue],
        pointer: str,
    ) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            compute_update(encoder, edits, [values[0], spoil(first(values[1])), values[2]], second_moments)
        assert refusal.value.pointer == pointer

    def test_missing_value_is_refused(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        with pytest.raises(InvalidEdit, match="each needs its own"):
            compute_update(encoder, edits, values[1:], second_moments)

    def test_error_among_the_values_is_raised(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        with pytest.raises(OptimizationDiverged, match="not finite"):
            compute_update(encoder, edits, [*values[:2], OptimizationDiverged("not finite")], second_moments)

    def test_invalid_preserved_prompt_is_named(
        self, encoder: ClipEncoder, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        with pytest.raises(InvalidPrompt) as refusal:
            compute_update(encoder, edits, values, second_moments, preserve=["bird", " "])
        assert refusal.value.pointer == "/preserve"


def _singular(moments: SecondMoments, *, layer: int) -> SecondMoments:
    return SecondMoments({**moments.moments, layer: torch.zeros(MLP_WIDTH, MLP_WIDTH).double()}, 0, 0)


class TestEveryFamily:
    def test_update_reaches_the_values_in_each_encoder(
        self,
        any_pipeline: EditablePipeline,
        edits: list[ConceptEdit],
        any_values: list[EditValue],
        any_moments: SecondMoments,
    ) -> None:
        for encoder in any_pipeline.encoders:
            update = compute_update(encoder, edits, any_values, any_moments, moment_weight=1e-4)
            assert (update.encoder, tuple(update.layers)) == (encoder.name, encoder.default_edited_layers)
            assert max(update.relative_residuals) < 0.05

    def test_update_does_not_depend_on_the_other_encoder(
        self, sdxl: EditablePipeline, edits: list[ConceptEdit], tmp_path: Path
    ) -> None:
        """The other encoder's part of the values and moments changes nothing."""
        values = [value for value in optimize_values(sdxl, edits) if isinstance(value, EditValue)]
        moments = [estimate_second_moments(encoder, CAPTIONS) for encoder in sdxl.encoders]
        for index, encoder in enumerate(sdxl.encoders):
            alone = [EditValue({encoder.name: value.encoders[encoder.name]}) for value in values]
            expected = compute_update(encoder, edits, alone, FactoredMoments(moments[index], encoder=encoder.name))
            assert_equal(compute_update(encoder, edits, values, SecondMoments.join(moments)), expected)

    def test_value_of_another_encoder_is_refused(
        self, sdxl: EditablePipeline, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
    ) -> None:
        moments = dataclasses.replace(second_moments, encoder="text_encoder_2")
        with pytest.raises(InvalidEdit, match="another text encoder") as refusal:
            compute_update(sdxl.encoders[1], edits, values, moments)
        assert refusal.value.pointer == "/edits/0"
