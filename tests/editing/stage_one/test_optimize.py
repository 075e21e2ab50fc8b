"""Stage I on a random pipeline: losses, restarts, batches, and determinism."""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from editing.chunks import ChunkSize
from editing.edits import (
    Balance,
    ConceptEdit,
    DestinationPrompt,
    Erasure,
    Objective,
    ReferenceImages,
    StageOneSettings,
)
from editing.encoders.clip import ClipEncoder
from editing.errors import Cancelled, EditingError, InvalidEdit, InvalidPrompt, OptimizationDiverged
from editing.families.conditions import join_encodings
from editing.pipelines import EditablePipeline
from editing.stage_one import noise, optimization
from editing.stage_one.optimization import build_optimizations, draw_noise
from editing.stage_one.optimize import StageOneProgress, compute_noise_losses, optimize_values
from editing.stage_one.prompt_batch import PromptBatch
from editing.values import EditValue, mix
from tests.editing.values import first

TEXT = StageOneSettings(objective="text", optimization_steps=20, tolerance=0)
QUICK = StageOneSettings(
    optimization_steps=4,
    warmup_steps=0,
    num_images=2,
    noise_pool_size=6,
    noise_batch_size=2,
    num_inference_steps=2,
    guidance_scale=2.0,
)
CAT = ConceptEdit("cat", DestinationPrompt("dog"), settings=TEXT)
TREE = ConceptEdit("old tree", DestinationPrompt("the sea"), settings=TEXT, templates=("a {}", "{}"))
PICTURE = Image.new("RGB", (16, 16), "red")


def one(pipeline: EditablePipeline, edit: ConceptEdit) -> EditValue:
    (value,) = optimize_values(pipeline, [edit])
    assert isinstance(value, EditValue), value
    return value


def eos_states(pipeline: EditablePipeline, prompts: Sequence[str], *, delta: Tensor, subject: str | None) -> Tensor:
    """Return the library's own states at EOS, (p, d), with δ added by a hook at the subject's last token."""
    encoder = pipeline.encoder
    encoded = [encoder.tokenizer.encode(prompt) for prompt in prompts]

    def shift(_: object, __: object, output: Tensor) -> Tensor:
        for row, prompt in enumerate(prompts):
            if subject is not None:
                before = prompt[: prompt.rindex(subject) + len(subject)]
                output[row, len(encoder.tokenizer.encode(before).ids) - 2] += delta
        return output

    hook = encoder.blocks[encoder.value_layer].layer.register_forward_hook(shift)
    with torch.no_grad():
        states = encoder.model(encoder.pad([prompt.ids for prompt in encoded]).ids)[0]
    hook.remove()
    return torch.stack([states[row, prompt.text_end] for row, prompt in enumerate(encoded)])


class TestTextObjective:
    @pytest.mark.parametrize("edit", [CAT, TREE])
    def test_loss_is_equation_2(self, pipeline: EditablePipeline, edit: ConceptEdit) -> None:
        assert isinstance(edit.destination, DestinationPrompt)
        sources = [template.format(edit.source) for template in edit.templates]
        targets = [template.format(edit.destination.prompt) for template in edit.templates]
        target = eos_states(pipeline, targets, delta=torch.zeros(32), subject=None)
        value = one(pipeline, edit)
        before, after = (
            (eos_states(pipeline, sources, delta=delta, subject=edit.source) - target).square().mean().item()
            for delta in (torch.zeros(32), first(value).delta)
        )
        assert value.text_losses[0] == pytest.approx(before, rel=1e-4)
        assert len(value.text_losses) == edit.settings.optimization_steps
        assert after < 0.9 * before
        assert after == pytest.approx(value.text_losses[-1], rel=0.05)  # recorded before the last step
        assert value.noise_losses == ()

    def test_hidden_is_the_mean_over_the_templates(self, pipeline: EditablePipeline) -> None:
        encoder = pipeline.encoder
        hidden = []
        for template in CAT.templates:
            position = encoder.tokenizer.locate(template, "cat")
            states = encoder.run_layers(
                encoder.embed(encoder.pad([position.ids]).ids), start=0, stop=encoder.value_layer + 1
            )
            hidden.append(states[0, position.last_subject_index])
        torch.testing.assert_close(first(one(pipeline, CAT)).hidden, torch.stack(hidden).mean(0))

    def test_delta_norm_is_limited(self, pipeline: EditablePipeline) -> None:
        value = one(pipeline, dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, max_delta_norm=0.1)))
        assert first(value).delta_norm == pytest.approx(0.1 * first(value).hidden_norm, rel=1e-5)

    def test_layer_can_be_chosen(self, pipeline: EditablePipeline) -> None:
        value = one(pipeline, dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, layer=1)))
        assert first(value).layer == 1
        assert value.text_losses[-1] < value.text_losses[0]

    def test_erasure_optimizes_towards_the_empty_template(self, pipeline: EditablePipeline) -> None:
        value = one(pipeline, ConceptEdit("cat", Erasure(), settings=TEXT, templates=("a photo of {}",)))
        same = one(pipeline, ConceptEdit("cat", Erasure("dog"), settings=TEXT, templates=("a photo of {}",)))
        assert value.text_losses[-1] < value.text_losses[0]
        assert not torch.equal(first(value).delta, first(same).delta)
        named = one(pipeline, ConceptEdit("cat", DestinationPrompt("dog"), settings=TEXT, templates=("a photo of {}",)))
        assert torch.equal(first(same).delta, first(named).delta)


class TestTolerance:
    def test_published_preset_uses_all_of_its_steps(self, pipeline: EditablePipeline) -> None:
        """It does not stop when Adam's loss rises."""
        settings = dataclasses.replace(StageOneSettings.preset("published"), objective="text")
        (value,) = optimize_values(pipeline, [dataclasses.replace(CAT, settings=settings)])
        assert isinstance(value, EditValue)
        assert len(value.text_losses) == 200
        assert any(later > earlier for earlier, later in itertools.pairwise(value.text_losses))

    def test_text_steps_end_early(self, pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(optimization, "_INITIAL_STEPS", (1.0,))
        loose = dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, optimization_steps=200, tolerance=0.05))
        all_losses = one(pipeline, loose).text_losses
        assert len(all_losses) < 100
        losses = [loss for loss, _ in itertools.groupby(all_losses)]  # a rejected point repeats the last loss
        assert len(losses) >= 4
        assert losses[-4] - losses[-1] < 0.05 * losses[0]
        assert losses[-5] - losses[-2] >= 0.05 * losses[0] or len(losses) == 4

    def test_noise_steps_start_at_their_own_step(self, pipeline: EditablePipeline) -> None:
        seen: list[StageOneProgress] = []
        settings = dataclasses.replace(QUICK, optimization_steps=100, warmup_steps=98, tolerance=0.5)
        optimize_values(pipeline, [dataclasses.replace(CAT, settings=settings)], progress=seen.append)
        steps = [progress.step for progress in seen]
        assert steps[-2:] == [99, 100] or steps[-20:] == list(range(81, 101))
        assert len(steps) < 60

    def test_lbfgs_reaches_a_lower_loss_than_adam(self, pipeline: EditablePipeline) -> None:
        adam = dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, text_optimizer="adam"))
        assert one(pipeline, CAT).text_losses[-1] < one(pipeline, adam).text_losses[-1]


class TestRestarts:
    """Optimizations whose L-BFGS ends with most of its loss left."""

    @pytest.fixture
    def all_stalled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(optimization, "_STALLED", 0.0)  # every optimization counts as stalled

    @pytest.fixture
    def edit(self) -> ConceptEdit:
        return dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, optimization_steps=200, tolerance=1e-2))

    def test_three_first_steps_are_tried_and_the_best_is_kept(
        self, pipeline: EditablePipeline, edit: ConceptEdit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = []
        for start in optimization._INITIAL_STEPS:
            with monkeypatch.context() as patch:
                patch.setattr(optimization, "_INITIAL_STEPS", (start,))
                alone.append(one(pipeline, edit))
        monkeypatch.setattr(optimization, "_STALLED", 0.0)
        value = one(pipeline, edit)
        best = min(alone, key=lambda value: value.text_losses[-1])
        assert value.text_losses[-1] == pytest.approx(best.text_losses[-1])
        assert torch.allclose(first(value).delta, first(best).delta, atol=1e-5)
        assert sum(len(each.text_losses) for each in alone) <= len(value.text_losses) <= 200

    @pytest.mark.usefixtures("all_stalled")
    def test_restarts_use_no_additional_steps(self, pipeline: EditablePipeline, edit: ConceptEdit) -> None:
        first = one(
            pipeline, dataclasses.replace(edit, settings=dataclasses.replace(edit.settings, optimization_steps=12))
        )
        assert len(first.text_losses) <= 13  # the thirteenth is that of the best start
        assert first.text_losses[-1] == min(first.text_losses)

    @pytest.mark.usefixtures("all_stalled")
    def test_adam_does_not_restart(self, pipeline: EditablePipeline, edit: ConceptEdit) -> None:
        adam = dataclasses.replace(edit, settings=dataclasses.replace(edit.settings, text_optimizer="adam"))
        losses = one(pipeline, adam).text_losses
        assert losses.count(losses[0]) == 1

    @pytest.mark.usefixtures("all_stalled")
    def test_noise_steps_follow_the_last_start(self, pipeline: EditablePipeline) -> None:
        settings = dataclasses.replace(QUICK, optimization_steps=100, warmup_steps=80, tolerance=1e-2)
        value = one(pipeline, dataclasses.replace(CAT, settings=settings))
        assert len(value.noise_losses) == 20

    @pytest.mark.usefixtures("all_stalled")
    def test_balance_restarts_all_of_its_prompts(self, pipeline: EditablePipeline, edit: ConceptEdit) -> None:
        balance = dataclasses.replace(edit, destination=Balance({"dog": 1, "the sea": 2}))
        assert first(one(pipeline, balance)).delta.isfinite().all()


class TestMemory:
    def test_chunk_size_falls_when_memory_runs_out(
        self, pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The U-Net fails on more than two latents: the values equal those of two at a time."""
        edits = [dataclasses.replace(edit, settings=QUICK) for edit in (CAT, TREE)]
        monkeypatch.setattr(pipeline.generator, "chunks", ChunkSize(2))
        monkeypatch.setattr(pipeline.generator, "inference_chunks", ChunkSize(2))
        expected = optimize_values(pipeline, edits)

        forward, failures = pipeline.generator.network.forward, []

        def narrow(sample: Tensor, *args: object, **kwargs: object) -> object:
            if len(sample) > 2:
                failures.append(len(sample))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(sample, *args, **kwargs)

        monkeypatch.setattr(pipeline.generator.network, "forward", narrow)
        monkeypatch.setattr(pipeline.generator, "chunks", ChunkSize(32))
        monkeypatch.setattr(pipeline.generator, "inference_chunks", ChunkSize(32))
        values = optimize_values(pipeline, edits)
        # Four pictures, guided, and half of them; the latents of a step; then two at a time to the end.
        assert failures == [8, 4, 4]
        for value, other in zip(values, expected, strict=True):
            assert isinstance(value, EditValue) and isinstance(other, EditValue)
            assert value.to_safetensors() == other.to_safetensors()
            assert value.noise_losses == other.noise_losses

    def test_failed_chunk_is_not_counted_twice(
        self, pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Memory runs out in the gradient of a step."""
        edit = dataclasses.replace(CAT, settings=QUICK)
        monkeypatch.setattr(pipeline.generator, "chunks", ChunkSize(32))
        expected = one(pipeline, edit)
        grad, calls = torch.autograd.grad, []

        def fails_once(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            gradients = grad(*args, **kwargs)
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradients

        monkeypatch.setattr(torch.autograd, "grad", fails_once)
        value = one(pipeline, edit)
        assert pipeline.generator.chunks.size == 1
        torch.testing.assert_close(first(value).delta, first(expected).delta, rtol=1e-3, atol=1e-3)


class TestNoiseObjectives:
    @pytest.mark.parametrize(("objective", "text_steps"), [("noise", 0), ("hybrid", 4)])
    def test_losses_are_recorded(self, pipeline: EditablePipeline, objective: Objective, text_steps: int) -> None:
        settings = dataclasses.replace(QUICK, objective=objective)
        value = one(pipeline, dataclasses.replace(CAT, settings=settings))
        assert (len(value.text_losses), len(value.noise_losses)) == (text_steps, 4)
        assert 0 < first(value).delta_norm

    @pytest.mark.parametrize(("warmup_steps", "noise_steps"), [(2, 2), (3, 1), (160, 1)])
    def test_warmup_steps_come_before_the_noise_steps(
        self, pipeline: EditablePipeline, warmup_steps: int, noise_steps: int
    ) -> None:
        seen: list[StageOneProgress] = []
        edit = dataclasses.replace(CAT, settings=dataclasses.replace(QUICK, warmup_steps=warmup_steps))
        (value,) = optimize_values(pipeline, [edit], progress=seen.append)
        assert isinstance(value, EditValue)
        assert (len(value.text_losses), len(value.noise_losses)) == (4, noise_steps)
        assert [progress.noise_loss is None for progress in seen].count(True) == 4 - noise_steps

    def test_chunked_gradient_equals_that_of_the_whole_loss(
        self, any_pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Chunks of the U-Net and one graph give the same gradient of L_noise with respect to δ."""
        pipeline = any_pipeline
        monkeypatch.setattr(pipeline.generator, "chunks", ChunkSize(3))
        edits = [dataclasses.replace(edit, settings=QUICK) for edit in (CAT, TREE)]
        running = [each for i, edit in enumerate(edits) for each in build_optimizations(edit, pipeline, index=i)]
        batches = []
        draw_noise(pipeline, running)
        for each in running:
            assert each.noise
            batch = each.noise.draw_batch()
            each.noise = _Repeat(batch)
            batches.append(batch)
        prompts = PromptBatch(pipeline, running)
        width = sum(encoder.width for encoder in pipeline.encoders)
        deltas = torch.randn(2, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
        condition = join_encodings(any_pipeline.family, prompts.encode(deltas))
        drawn = noise.NoisedPrompts.draw([each.noise for each in running if each.noise], prompts.first)
        losses, gradient = compute_noise_losses(pipeline.generator, drawn, condition)
        (chunked,) = torch.autograd.grad(condition.dot(gradient), deltas, retain_graph=True)

        whole = torch.stack(
            [
                (pipeline.generator.predict(b.noisy, b.timesteps, condition[start + b.templates]) - b.target)
                .square()
                .mean()
                for start, b in zip((0, len(CAT.templates)), batches, strict=True)
            ]
        )
        torch.testing.assert_close(losses, whole.detach())
        (expected,) = torch.autograd.grad(whole.sum(), deltas)
        torch.testing.assert_close(chunked, expected, rtol=1e-4, atol=1e-9)

    def test_without_text_weight_the_text_loss_ends_with_the_warmup(self, pipeline: EditablePipeline) -> None:
        """The other steps leave out the prompts of which no latents are drawn: the value is that of all prompts."""
        settings = dataclasses.replace(QUICK, optimization_steps=6, warmup_steps=3, noise_batch_size=1, tolerance=0)
        edits = [
            dataclasses.replace(edit, settings=dataclasses.replace(settings, text_weight=weight))
            for weight in (0.0, 1e-7)
            for edit in (CAT, TREE)
        ]
        outcomes = optimize_values(pipeline, edits[:2]) + optimize_values(pipeline, edits[2:])
        values = [value for value in outcomes if isinstance(value, EditValue)]
        assert [len(value.text_losses) for value in values] == [3, 3, 6, 6]
        assert [len(value.noise_losses) for value in values] == [3, 3, 3, 3]
        for without, tiny in zip(values[:2], values[2:], strict=True):
            torch.testing.assert_close(first(without).delta, first(tiny).delta, rtol=1e-3, atol=1e-5)

    def test_reference_images_need_no_destination_prompt(self, pipeline: EditablePipeline) -> None:
        value = one(pipeline, ConceptEdit("cat", ReferenceImages((PICTURE, PICTURE)), settings=QUICK))
        assert (len(value.text_losses), len(value.noise_losses)) == (0, 4)
        assert first(value).delta_norm > 0

    def test_damaged_image_is_the_edits_outcome(self, pipeline: EditablePipeline) -> None:
        damaged = Image.new("RGB", (4, 4))
        damaged.load = _fail  # type: ignore[method-assign]
        outcome, value = optimize_values(
            pipeline, [ConceptEdit("cat", ReferenceImages((damaged,)), settings=QUICK), TREE]
        )
        assert isinstance(outcome, EditingError)
        assert outcome.pointer == "/destination/images/0"
        assert isinstance(value, EditValue)


class TestFamilies:
    @pytest.mark.parametrize("settings", [TEXT, dataclasses.replace(QUICK, optimization_steps=20, noise_batch_size=6)])
    def test_losses_fall_in_every_family(self, any_pipeline: EditablePipeline, settings: StageOneSettings) -> None:
        value = one(any_pipeline, dataclasses.replace(CAT, settings=settings))
        assert value.text_losses[-1] < 0.95 * value.text_losses[0]
        assert list(value.encoders) == [encoder.name for encoder in any_pipeline.encoders]
        for part, encoder in zip(value.encoders.values(), any_pipeline.encoders, strict=True):
            assert (part.layer, part.delta.shape) == (encoder.value_layer, (encoder.width,))
            assert part.delta_norm > 0
            assert part.delta_norm <= settings.max_delta_norm * part.hidden_norm * 1.00001

    def test_noise_loss_alone_changes_both_encoders(self, sdxl: EditablePipeline) -> None:
        """It acts through cross-attention and the pooled output."""
        picture = ReferenceImages((PICTURE,))
        settings = dataclasses.replace(
            QUICK, optimization_steps=30, noise_batch_size=16, learning_rate=0.1, weight_decay=0.0, max_delta_norm=20.0
        )
        value = one(sdxl, ConceptEdit("cat", picture, settings=settings, templates=("{}",)))
        assert all(part.delta_norm > 0 for part in value.encoders.values())
        assert sum(value.noise_losses[-5:]) < sum(value.noise_losses[:5])

    def test_text_loss_is_the_sum_over_both_encoders(self, sdxl: EditablePipeline) -> None:
        assert isinstance(CAT.destination, DestinationPrompt)
        value = one(sdxl, CAT)
        before = 0.0
        for encoder in sdxl.encoders:
            sources, targets = (
                [encoder.tokenizer.encode(template.format(word)).ids for template in CAT.templates]
                for word in (CAT.source, CAT.destination.prompt)
            )
            with torch.no_grad():
                source, target = (encoder.model(encoder.pad(ids).ids) for ids in (sources, targets))
            assert isinstance(encoder, ClipEncoder)
            if encoder.projection is None:
                before += (source.pooler_output - target.pooler_output).square().mean().item()
            else:
                before += (source.text_embeds - target.text_embeds).square().mean().item()
        assert value.text_losses[0] == pytest.approx(before, rel=1e-4)

    def test_delta_norm_is_limited_in_each_encoder(self, sdxl: EditablePipeline) -> None:
        value = one(sdxl, dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, max_delta_norm=0.1)))
        for part in value.encoders.values():
            assert part.delta_norm == pytest.approx(0.1 * part.hidden_norm, rel=1e-5)

    def test_sdxl_states_at_eos_do_not_depend_on_delta(self, sdxl: EditablePipeline) -> None:
        """This is why its text loss uses the next layer: docs/decisions/0006."""
        prompts = PromptBatch(sdxl, build_optimizations(CAT, sdxl, index=0))
        deltas = torch.ones(1, sum(encoder.width for encoder in sdxl.encoders), requires_grad=True)
        ends = torch.tensor([sdxl.tokenizer.locate(template, "cat").text_end for template in CAT.templates])
        encodings = prompts.encode(deltas)
        for encoding in encodings:
            read = encoding.states[torch.arange(len(ends)), ends].square().sum()
            (gradient,) = torch.autograd.grad(read, deltas, retain_graph=True)
            assert not gradient.any()
        total = torch.stack([each.pooled.square().sum() for each in encodings if each.pooled is not None]).sum()
        (gradient,) = torch.autograd.grad(total, deltas)
        assert gradient.all()

    def test_layer_is_refused_for_two_encoders(self, sdxl: EditablePipeline) -> None:
        (outcome,) = optimize_values(sdxl, [dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, layer=1))])
        assert isinstance(outcome, InvalidEdit)
        assert outcome.pointer == "/settings/layer"

    def test_an_encoder_can_have_a_layer_of_its_own(self, sdxl: EditablePipeline) -> None:
        edit = dataclasses.replace(CAT, settings=TEXT)
        first, second = sdxl.encoders
        (value,) = optimize_values(sdxl, [edit], layers={second.name: 0})
        assert isinstance(value, EditValue)
        assert [value.encoders[each.name].layer for each in (first, second)] == [first.value_layer, 0]
        (refused,) = optimize_values(sdxl, [edit], layers={second.name: second.last_value_layer + 1})
        assert isinstance(refused, InvalidEdit)

    def test_every_tokenizer_must_take_the_prompt(self, sdxl: EditablePipeline) -> None:
        second = copy.copy(sdxl.encoders[1])
        second.tokenizer = copy.copy(second.tokenizer)
        second.tokenizer.max_length = 12
        shorter = dataclasses.replace(sdxl, encoders=(sdxl.encoders[0], second))
        (outcome,) = optimize_values(shorter, [CAT])  # "An image of cat" has 14 tokens
        assert isinstance(outcome, InvalidPrompt)
        assert outcome.pointer == "/templates/0"


class TestBalance:
    def test_value_is_the_weighted_mean(self, pipeline: EditablePipeline) -> None:
        seen: list[StageOneProgress] = []
        edit = ConceptEdit("cat", Balance({"dog": 3, "the sea": 1}), settings=TEXT)
        (value,) = optimize_values(pipeline, [edit], progress=seen.append)
        assert isinstance(value, EditValue)
        parts = [one(pipeline, dataclasses.replace(edit, destination=DestinationPrompt(p))) for p in ("dog", "the sea")]
        torch.testing.assert_close(
            first(value).delta, 0.75 * first(parts[0]).delta + 0.25 * first(parts[1]).delta, rtol=1e-3, atol=1e-4
        )
        mean_loss = 0.75 * parts[0].text_losses[0] + 0.25 * parts[1].text_losses[0]
        assert value.text_losses[0] == pytest.approx(mean_loss, rel=1e-4)
        assert [progress.step for progress in seen] == list(range(1, 21))


class TestBatch:
    def test_same_call_gives_the_same_bits(self, pipeline: EditablePipeline) -> None:
        edits = [CAT, dataclasses.replace(TREE, settings=QUICK)]
        first, again = optimize_values(pipeline, edits), optimize_values(pipeline, edits)
        for one_value, other in zip(first, again, strict=True):
            assert isinstance(one_value, EditValue) and isinstance(other, EditValue)
            assert one_value.to_safetensors() == other.to_safetensors()
            assert one_value.noise_losses == other.noise_losses

    @pytest.mark.parametrize("max_batch", [1, 2, 32])
    def test_other_edits_change_a_value_by_rounding_only(self, pipeline: EditablePipeline, max_batch: int) -> None:
        edits = [CAT, dataclasses.replace(CAT, settings=QUICK), TREE, dataclasses.replace(TREE, settings=QUICK)]
        for edit, value in zip(edits, optimize_values(pipeline, edits, max_batch=max_batch), strict=True):
            assert isinstance(value, EditValue)
            torch.testing.assert_close(first(value).delta, first(one(pipeline, edit)).delta, rtol=1e-3, atol=1e-3)

    def test_seed_comes_from_the_edit(self, pipeline: EditablePipeline) -> None:
        zero, other = (
            one(pipeline, dataclasses.replace(CAT, settings=dataclasses.replace(QUICK, seed=s))) for s in (0, 1)
        )
        assert zero.noise_losses != other.noise_losses

    def test_rows_end_at_their_own_steps(self, pipeline: EditablePipeline) -> None:
        short = dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, optimization_steps=7))
        value, longer = optimize_values(pipeline, [short, TREE])
        assert isinstance(value, EditValue) and isinstance(longer, EditValue)
        assert (len(value.text_losses), len(longer.text_losses)) == (7, 20)
        torch.testing.assert_close(first(value).delta, first(one(pipeline, short)).delta, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(first(longer).delta, first(one(pipeline, TREE)).delta, rtol=1e-3, atol=1e-3)

    def test_next_edit_starts_when_one_ends(self, pipeline: EditablePipeline) -> None:
        short = dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, optimization_steps=5))
        edits = [short, TREE, dataclasses.replace(CAT, source="fish")]
        order: list[tuple[int, int]] = []
        values = optimize_values(
            pipeline, edits, max_batch=2, progress=lambda progress: order.append((progress.edit_index, progress.step))
        )
        together = [(0, 5), (1, 5), (1, 6), (2, 1), (1, 7), (2, 2)]
        assert order[8:14] == together
        for edit, value in zip(edits, values, strict=True):
            assert isinstance(value, EditValue)
            assert len(value.text_losses) == edit.settings.optimization_steps
            torch.testing.assert_close(first(value).delta, first(one(pipeline, edit)).delta, rtol=1e-3, atol=1e-3)

    def test_next_edit_starts_when_one_is_cancelled(self, pipeline: EditablePipeline) -> None:
        order: list[tuple[int, int]] = []
        outcomes = optimize_values(
            pipeline,
            [CAT, TREE],
            max_batch=1,
            progress=lambda progress: order.append((progress.edit_index, progress.step)),
            cancelled=lambda index: index == 0 and len(order) == 2,
        )
        assert order[:3] == [(0, 1), (0, 2), (1, 1)]
        assert isinstance(outcomes[0], Cancelled) and isinstance(outcomes[1], EditValue)

    def test_balance_is_never_split(self, pipeline: EditablePipeline) -> None:
        balance = ConceptEdit("cat", Balance({"dog": 1, "fish": 1, "the sea": 1}), settings=TEXT)
        order: list[int] = []
        values = optimize_values(
            pipeline, [TREE, balance], max_batch=2, progress=lambda progress: order.append(progress.edit_index)
        )
        assert order == [0] * 20 + [1] * 20  # three do not fit beside another and run alone
        assert isinstance(values[1], EditValue)
        torch.testing.assert_close(first(values[1]).delta, first(one(pipeline, balance)).delta, rtol=1e-3, atol=1e-3)

    def test_values_of_a_balance_can_be_mixed_again(self, pipeline: EditablePipeline) -> None:
        """The weights of a balance do not change its prompts' values."""
        thirds, other = (
            one(pipeline, ConceptEdit("cat", Balance(weights), settings=TEXT))
            for weights in ({"dog": 1, "fish": 2}, {"dog": 4, "fish": 1})
        )
        dog, fish = thirds.attributes
        assert first(thirds).delta.equal(torch.stack([1 / 3 * first(dog).delta, 2 / 3 * first(fish).delta]).sum(0))
        assert mix(thirds.attributes, [0.8, 0.2]).to_safetensors() == other.to_safetensors()
        assert mix(thirds.attributes, [0.8, 0.2]).text_losses == other.text_losses
        torch.testing.assert_close(
            first(dog).delta,
            first(one(pipeline, ConceptEdit("cat", DestinationPrompt("dog"), settings=TEXT))).delta,
            rtol=1e-3,
            atol=1e-3,
        )

    def test_text_steps_of_all_edits_come_first(self, pipeline: EditablePipeline) -> None:
        seen: list[StageOneProgress] = []
        edits = [dataclasses.replace(CAT, settings=dataclasses.replace(QUICK, warmup_steps=2)), TREE]
        optimize_values(pipeline, edits, progress=seen.append)
        noisy = [progress.noise_loss is not None for progress in seen]
        assert noisy == sorted(noisy)
        assert [progress.edit_index for progress in seen if progress.noise_loss is not None] == [0, 0]

    def test_failed_edit_does_not_affect_others(self, pipeline: EditablePipeline) -> None:
        edits = [
            CAT,
            dataclasses.replace(CAT, settings=dataclasses.replace(QUICK, text_weight=1e39)),  # infinite in float32
            ConceptEdit("c" * 80, DestinationPrompt("dog"), settings=TEXT),
            dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, weight_decay=1e39)),
            dataclasses.replace(CAT, settings=dataclasses.replace(TEXT, layer=3)),
            TREE,
            dataclasses.replace(TREE, settings=QUICK),
        ]
        outcomes = optimize_values(pipeline, edits, cancelled=lambda index: index == 6)
        diverged = OptimizationDiverged
        kinds = [EditValue, diverged, InvalidPrompt, diverged, InvalidEdit, EditValue, Cancelled]
        assert [type(outcome) for outcome in outcomes] == kinds
        assert isinstance(outcomes[4], InvalidEdit)
        assert outcomes[4].pointer == "/settings/layer"
        for index in (0, 5):
            value = outcomes[index]
            assert isinstance(value, EditValue)
            alone = first(one(pipeline, edits[index])).delta
            torch.testing.assert_close(first(value).delta, alone, rtol=1e-3, atol=1e-3)

    def test_cancellation_between_steps(self, pipeline: EditablePipeline) -> None:
        steps: dict[int, list[int]] = {0: [], 1: []}
        outcomes = optimize_values(
            pipeline,
            [CAT, TREE],
            progress=lambda progress: steps[progress.edit_index].append(progress.step),
            cancelled=lambda index: index == 0 and len(steps[0]) == 3,
        )
        assert isinstance(outcomes[0], Cancelled)
        assert isinstance(outcomes[1], EditValue)
        assert steps == {0: [1, 2, 3], 1: list(range(1, 21))}

    def test_every_step_is_reported(self, pipeline: EditablePipeline) -> None:
        seen: list[StageOneProgress] = []
        (value,) = optimize_values(pipeline, [dataclasses.replace(CAT, settings=QUICK)], progress=seen.append)
        assert isinstance(value, EditValue)
        assert [(p.edit_index, p.step, p.steps) for p in seen] == [(0, step, 4) for step in (1, 2, 3, 4)]
        assert tuple(p.text_loss for p in seen) == value.text_losses
        assert tuple(p.noise_loss for p in seen) == value.noise_losses

    def test_only_delta_changes(self, pipeline: EditablePipeline) -> None:
        before = {name: tensor.clone() for name, tensor in pipeline.encoder.model.state_dict().items()}
        one(pipeline, dataclasses.replace(CAT, settings=QUICK))
        assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.encoder.model.state_dict().items())
        for model in (pipeline.encoder.model, pipeline.generator.network, pipeline.generator.autoencoder.model):
            assert all(parameter.grad is None for parameter in model.parameters())

    def test_no_edits_give_no_values(self, pipeline: EditablePipeline) -> None:
        assert optimize_values(pipeline, []) == []


class _Repeat:
    """A noise source that always draws the same batch."""

    def __init__(self, batch: noise.NoiseBatch) -> None:
        self.batch = batch

    def draw_batch(self) -> noise.NoiseBatch:
        return self.batch


def _fail() -> None:
    raise OSError("image file is truncated")
