"""Stage I: optimize for each edit the value that makes the model draw its source as its destination.

δ (d,) is added to the output of layer L at the last subject token of every source prompt. It alone is optimized:

    loss = L_noise + text_weight · L_txt + weight_decay · ‖δ‖²/‖h‖²                                           (Eq. 6)

L_txt (Eq. 2) compares the encoder's output at EOS with that for the destination; L_noise (Eq. 3 or 4) compares the
generator's predictions. Many edits share a batch. A pipeline with several encoders has a δ in each, at a layer of its
own, and one loss: they are optimized together.

Shapes: e optimizations in a batch, p prompts (all templates of all optimizations), b noised latents, d width of an
encoder, D the sum of the encoders' widths.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from editing.condition import Condition
from editing.edits import ConceptEdit
from editing.errors import Cancelled, EditingError, OptimizationDiverged
from editing.families.conditions import join_encodings
from editing.generators.generator import Generator
from editing.pipelines import EditablePipeline
from editing.stage_one.noise import NoisedPrompts
from editing.stage_one.optimization import Optimization, build_optimizations, draw_noise
from editing.stage_one.optimizers import LBFGS, Adam, RowOptimizer
from editing.stage_one.prompt_batch import PromptBatch
from editing.values import EditValue, EncoderValue, mix, weigh_losses

Group = list[Optimization]
"""All optimizations of one edit. They start, count steps and end together."""


@dataclass(frozen=True)
class StageOneProgress:
    edit_index: int
    """Of the edit in the call."""
    step: int
    """Steps done, 1 … steps."""
    steps: int
    text_loss: float | None
    noise_loss: float | None


def optimize_values(
    pipeline: EditablePipeline,
    edits: Sequence[ConceptEdit],
    *,
    progress: Callable[[StageOneProgress], None] | None = None,
    cancelled: Callable[[int], bool] | None = None,
    max_batch: int = 32,
    layers: Mapping[str, int] = MappingProxyType({}),
) -> list[EditValue | EditingError]:
    """Optimize the value of every edit and return one outcome per edit, in order.

    An edit that is invalid, diverges or is cancelled has its error as its outcome and affects no other edit.
    `cancelled(edit_index)` is called before every step, `progress` after it. `max_batch` is the number of δ that share
    a batch; a `Balance` has one for each of its prompts and is never split. `layers` has L of encoders by name,
    where an edit has no layer of its own; other encoders have their default.

    The same call on the same platform with the same number of threads gives the same bits. All random numbers come
    from the edit's own seed. Its pictures, targets and value depend on other edits by rounding only, since they share
    batches.
    """
    outcomes: list[EditValue | EditingError | None] = [None] * len(edits)
    groups: list[Group] = []
    for index, edit in enumerate(edits):
        try:
            groups.append(build_optimizations(edit, pipeline, index=index, layers=layers))
        except EditingError as error:
            outcomes[index] = error
    # The text steps of all edits come first: they need no generator, and hundreds of δ fit into one batch.
    for noisy in (False, True):
        for waiting in _group_by_batch(groups, noisy=noisy):
            batch = _Batch(pipeline, waiting, noisy=noisy, max_batch=max_batch, cancelled=cancelled)
            while batch.refill():
                batch.run_step()
                if progress:
                    for group in batch.groups:
                        progress(_describe_progress(group))
    for group in groups:
        outcomes[group[0].index] = _build_outcome(pipeline, group)
    return [outcome for outcome in outcomes if outcome is not None]


def _group_by_batch(groups: Iterable[Group], *, noisy: bool) -> list[list[Group]]:
    """Return the groups that have steps of this kind, by what may share a batch: layers and optimizer."""
    batches: dict[tuple[tuple[int, ...], str], list[Group]] = {}
    for group in groups:
        first = group[0]
        if first.error is None and first.step < _last_step(first, noisy=noisy):
            optimizer = "adam" if noisy else first.edit.settings.text_optimizer
            batches.setdefault((first.layers, optimizer), []).append(group)
    return list(batches.values())


def _last_step(optimization: Optimization, *, noisy: bool) -> int:
    return optimization.edit.settings.optimization_steps if noisy else optimization.text_steps


class _Batch:
    """The groups that run together. When one ends, waiting groups take its place before the next step."""

    def __init__(
        self,
        pipeline: EditablePipeline,
        waiting: Iterable[Group],
        *,
        noisy: bool,
        max_batch: int,
        cancelled: Callable[[int], bool] | None,
    ) -> None:
        self.groups: list[Group] = []
        self._pipeline = pipeline
        self._waiting = deque(waiting)
        self._noisy = noisy
        self._max_batch = max_batch
        self._cancelled = cancelled
        use_adam = noisy or self._waiting[0][0].edit.settings.text_optimizer == "adam"
        self._optimizer: RowOptimizer = Adam() if use_adam else LBFGS()
        self._encoded: dict[Optimization, PromptBatch] = {}
        """The source prompts of each optimization that runs or is about to. They hold most of the memory."""
        self._prompts: PromptBatch | None = None

    @property
    def _optimizations(self) -> Group:
        return [optimization for group in self.groups for optimization in group]

    def refill(self) -> bool:
        """Remove the groups that have ended and start those that fit. Return False if none is left."""
        for group in self.groups:
            self._check_cancelled(group)
        rows: list[int] = []  # of the optimizer's state that stay
        staying: list[Group] = []
        row = 0
        for group in self.groups:
            if self._has_ended(group):
                for optimization in group:
                    optimization.take_best()
                    optimization.noise = None
                    self._encoded.pop(optimization, None)
            elif self._has_stalled(group):
                for optimization in group:
                    optimization.restart()
                self._waiting.appendleft(group)
            else:
                staying.append(group)
                rows += range(row, row + len(group))
            row += len(group)
        self.groups = staying
        starting = self._start_groups(free_rows=self._max_batch - len(rows))
        if len(rows) < row or starting:
            self._optimizer.keep(rows)
            self.groups += starting
            self._compose([optimization for group in starting for optimization in group])
        return bool(self.groups)

    def _has_ended(self, group: Group) -> bool:
        first = group[0]
        if self._has_converged(group) and not self._has_stalled(group):
            for optimization in group:
                optimization.step = optimization.text_steps
        return first.error is not None or first.step >= _last_step(first, noisy=self._noisy)

    def _has_converged(self, group: Group) -> bool:
        return not self._noisy and all(optimization.converged for optimization in group)

    def _has_stalled(self, group: Group) -> bool:
        return self._has_converged(group) and any(optimization.stalled for optimization in group)

    def _start_groups(self, *, free_rows: int) -> list[Group]:
        """Return the next groups that fit, ready to run. One that is larger than a batch runs alone."""
        starting: list[Group] = []
        rows = free_rows
        while self._waiting and (len(self._waiting[0]) <= rows or not (self.groups or starting)):
            if self._waiting[0][0] not in self._encoded:
                self._encode_ahead()
            group = self._waiting.popleft()
            self._check_cancelled(group)
            if group[0].error is None:
                starting.append(group)
                rows -= len(group)
        if self._noisy and starting:
            draw_noise(self._pipeline, [optimization for group in starting for optimization in group])
            drawn = [group for group in starting if group[0].error is None]
            return drawn or self._start_groups(free_rows=free_rows)
        return starting

    def _encode_ahead(self) -> None:
        """Encode the prompts of the next groups in one pass, which costs far less than a pass for each."""
        chunk: Group = []
        for group in self._waiting:
            if chunk and len(chunk) + len(group) > self._max_batch:
                break
            chunk += group
        batches = PromptBatch(self._pipeline, chunk, full_length=self._noisy).split()
        for optimization, prompts in zip(chunk, batches, strict=True):
            self._encoded[optimization] = prompts
            optimization.hidden = prompts.hidden[0]

    def _compose(self, starting: Group) -> None:
        """Join the prompts of the batch, and add the starting optimizations to the optimizer's rows."""
        prompts = [self._encoded[optimization] for optimization in self._optimizations]
        self._prompts = PromptBatch.join(prompts) if prompts else None
        if starting:
            rates = torch.tensor([each.edit.settings.learning_rate for each in starting])  # (e,)
            deltas = torch.stack([each.delta for each in starting])  # (e, D)
            steps = torch.stack([each.initial_step for each in starting])  # (e,)
            self._optimizer.join(deltas, learning_rate=rates.to(deltas.device), initial_step=steps)

    def _check_cancelled(self, group: Group) -> None:
        first = group[0]
        running = first.error is None and first.step < _last_step(first, noisy=self._noisy)
        if running and self._cancelled and self._cancelled(first.index):
            _stop(group, Cancelled(f"cancelled after {first.step} steps"))

    def run_step(self) -> None:
        """Run one step of every optimization and record its losses."""
        prompts, optimizer, optimizations = self._prompts, self._optimizer, self._optimizations
        assert prompts is not None
        uses_text, used, batch = prompts.uses_text, None, None
        if self._noisy:
            batch = NoisedPrompts.draw([each.noise for each in optimizations if each.noise], prompts.first)
            if not uses_text:  # the other prompts have no part in the loss
                used, batch = batch.select_prompts()
        with torch.enable_grad():
            # Step 1: the encoders with δ in place.
            deltas = optimizer.points.detach().requires_grad_()  # (e, D)
            encodings = prompts.encode(deltas, used)
            # Step 2: the losses without the generator, Eq. 2 and the regularizer.
            text = prompts.text_losses(encodings) if uses_text else torch.zeros_like(prompts.text_weights)  # (e,)
            losses = text * prompts.text_weights + prompts.regularizer(deltas)  # (e,)
            total = losses.sum()
            # Step 3: L_noise, Eq. 3 or 4. Its gradient G with respect to the condition is known; adding the inner
            # product of the condition and G carries it on into the encoders.
            noise = torch.zeros_like(losses)
            if batch:
                condition = join_encodings(self._pipeline.family, encodings)
                noise, gradient = compute_noise_losses(self._pipeline.generator, batch, condition)
                total = total + condition.dot(gradient)
            # Step 4: the gradient of every row. Rows share only weights without gradients, so the sum of the losses
            # gives each δ its own gradient, and a loss that is not finite affects its own δ alone.
            (gradients,) = torch.autograd.grad(total, deltas)
        # Step 5: move δ, with ‖δ‖ ≤ max_delta_norm · ‖h‖.
        with torch.no_grad():
            accepted = optimizer.step(losses.detach() + noise, gradients, prompts.limit_norm)
        self._record(text.tolist(), noise.tolist(), accepted.tolist())

    def _record(self, text: Sequence[float], noise: Sequence[float], accepted: Sequence[bool]) -> None:
        optimizer = self._optimizer
        losses, converged = optimizer.losses.tolist(), optimizer.converged.tolist()
        for row, each in enumerate(self._optimizations):
            has_text_loss = each.text_weight > 0
            each.step += 1
            each.delta = optimizer.best[row]
            each.at_minimum = converged[row]
            if accepted[row] or not each.losses:  # a rejected point says nothing about progress
                each.losses.append(losses[row])
            if has_text_loss:
                each.text_losses.append(text[row] if accepted[row] or not each.text_losses else each.text_losses[-1])
            if self._noisy:
                each.noise_losses.append(noise[row])
        for group in self.groups:
            if not all(math.isfinite(each.losses[-1]) for each in group):
                detail = f"the loss is not finite at step {group[0].step}: lower learning_rate, or check the weights"
                _stop(group, OptimizationDiverged(detail))


def compute_noise_losses(generator: Generator, batch: NoisedPrompts, condition: Condition) -> tuple[Tensor, Condition]:
    """Return L_noise (e,) of Eq. 3 or 4, and its gradient with respect to the condition of the p prompts.

    The generator runs and is differentiated on a few latents at a time, so that its activations fit into memory. The
    gradient stops at the condition; the caller carries it through the encoders in one pass.
    """
    leaf = condition.map(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()))
    inputs = replace(leaf, mask=None)
    gradient = inputs.map(lambda tensor: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False))

    def differentiate(chunk: slice) -> Tensor:
        prediction = generator.predict(batch.noisy[chunk], batch.timesteps[chunk], leaf[batch.prompts[chunk]])
        errors = (prediction - batch.target[chunk]).square().mean((1, 2, 3)) * batch.shares[chunk]  # (chunk,)
        for total, own in zip(gradient.tensors, torch.autograd.grad(errors.sum(), inputs.tensors), strict=True):
            total.add_(own)
        return errors.detach()

    errors = torch.cat(generator.chunks.run_in_chunks(len(batch.noisy), differentiate))  # (b,)
    return batch.sum_by_optimization(errors), gradient


def _stop(group: Group, error: EditingError) -> None:
    for optimization in group:
        optimization.error = error


def _describe_progress(group: Group) -> StageOneProgress:
    shares = [each.share for each in group]
    text = weigh_losses([each.text_losses[-1:] for each in group], shares)
    noise = weigh_losses([each.noise_losses[-1:] for each in group], shares)
    return StageOneProgress(
        edit_index=group[0].index,
        step=group[0].step,
        steps=group[0].edit.settings.optimization_steps,
        text_loss=text[-1] if text else None,
        noise_loss=noise[-1] if noise else None,
    )


def _build_outcome(pipeline: EditablePipeline, group: Group) -> EditValue | EditingError:
    if group[0].error:
        return group[0].error
    if not all(each.delta.isfinite().all() for each in group):
        return OptimizationDiverged("δ is not finite after the last step: lower learning_rate")
    values = [_build_value(pipeline, each) for each in group]
    return values[0] if len(values) == 1 else mix(values, [each.share for each in group])


def _build_value(pipeline: EditablePipeline, optimization: Optimization) -> EditValue:
    widths = optimization.widths
    vectors = zip(optimization.delta.split(widths), optimization.hidden.split(widths), strict=True)  # (d,) each
    encoders = zip(pipeline.encoders, optimization.layers, vectors, strict=True)
    return EditValue(
        {
            encoder.name: EncoderValue(layer, delta.cpu().clone(), hidden.cpu().clone())
            for encoder, layer, (delta, hidden) in encoders
        },
        text_losses=tuple(optimization.text_losses),
        noise_losses=tuple(optimization.noise_losses),
    )
