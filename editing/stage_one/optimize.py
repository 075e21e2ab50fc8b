"""Stage I: for each edit, the value vector that makes the source be drawn as the destination. Many edits in one batch.

δ (d,) is added to the output of layer L at the last subject token of every template prompt, and optimised alone:

    loss = L_noise + text_weight · L_txt + weight_decay · ‖δ‖²/‖h‖²

L_txt (Eq. 2) compares what the encoder says at EOS with what it says for the destination; L_noise (Eq. 3, 4) what the
U-Net makes of it. Only the layers after L run in a step: the states up to L are computed once.

A pipeline of several encoders has a δ in each, at a layer of its own, and one loss: they are found together.

Shapes: e searches in a batch, p prompts (all templates of all searches), s positions, d width of an encoder, D of all.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editing.edits import ConceptEdit
from editing.errors import Cancelled, EditingError, OptimizationDiverged
from editing.pipelines import Condition, EditablePipeline
from editing.stage_one.optimizers import LBFGS, Adam, RowOptimizer
from editing.stage_one.search import PromptBatch, Search, build_optimizations
from editing.values import EditValue, EncoderValue, mix, weigh_losses


@dataclass(frozen=True)
class StageOneProgress:
    edit_index: int
    """Into the call's edits."""
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
) -> list[EditValue | EditingError]:
    """Optimise the value of every edit; one outcome per edit, in order.

    An edit that cannot be located, diverges or is cancelled has its error as its outcome and disturbs no other.
    `cancelled(edit_index)` is asked before every step, `progress` is called after it. `max_batch` bounds how many δ
    share a batch (a `Balance` has one for each of its prompts and is never split).

    What holds bit for bit: the same call on the same platform with the same number of threads gives the same values.
    Everything random comes from the edit's own seed, and its pictures and targets are made without the others; but
    the sums of a step run over the batch, so that with other edits beside it a value is the same within rounding.
    """
    outcomes: list[EditValue | EditingError | None] = [None] * len(edits)
    groups: list[list[Search]] = []
    for index, edit in enumerate(edits):
        try:
            groups.append(build_optimizations(edit, pipeline, index=index))
        except EditingError as error:
            outcomes[index] = error
    for noisy in (False, True):
        for waiting in _alike(groups, noisy=noisy):
            batch = _Batch(pipeline, waiting, noisy=noisy, max_batch=max_batch, cancelled=cancelled)
            while batch.refill():
                batch.step()
                if progress:
                    for group in batch.groups:
                        progress(_progress(group))
    for group in groups:
        outcomes[group[0].index] = _outcome(pipeline, group)
    return [outcome for outcome in outcomes if outcome is not None]


def _alike(groups: Iterable[list[Search]], *, noisy: bool) -> list[list[list[Search]]]:
    """The groups that have steps with noise, or without, by what may share a batch: the layers and one optimiser."""
    alike: dict[tuple[tuple[int, ...], str], list[list[Search]]] = {}
    for group in groups:
        first = group[0]
        if first.error is None and first.step < _last_step(first, noisy=noisy):
            optimizer = "adam" if noisy else first.edit.settings.text_optimizer
            alike.setdefault((first.layers, optimizer), []).append(group)
    return list(alike.values())


def _last_step(search: Search, *, noisy: bool) -> int:
    return search.edit.settings.optimization_steps if noisy else search.text_steps


class _Batch:
    """The searches that run together. Where one ends, those that wait take its place before the next step.

    A group is all the searches of one edit: it starts, counts and ends as one.
    """

    def __init__(
        self,
        pipeline: EditablePipeline,
        waiting: Iterable[list[Search]],
        *,
        noisy: bool,
        max_batch: int,
        cancelled: Callable[[int], bool] | None,
    ) -> None:
        self.groups: list[list[Search]] = []
        self._pipeline = pipeline
        self._waiting = deque(waiting)
        self._noisy = noisy
        self._max_batch = max_batch
        self._cancelled = cancelled
        adam = noisy or self._waiting[0][0].edit.settings.text_optimizer == "adam"
        self._optimizer: RowOptimizer = Adam() if adam else LBFGS()
        self._prompts: PromptBatch | None = None

    @property
    def _searches(self) -> list[Search]:
        return [search for group in self.groups for search in group]

    def refill(self) -> bool:
        """Let go of the groups that have ended and start those that there is room for. False: none is left."""
        for group in self.groups:
            self._check(group)
        rows: list[int] = []
        staying: list[list[Search]] = []
        row = 0
        for group in self.groups:
            if self._ended(group):
                for search in group:
                    search.settle()
                    search.release()
            elif self._astray(group):
                for search in group:
                    search.start_again()
                self._waiting.appendleft(group)
            else:
                staying.append(group)
                rows += range(row, row + len(group))
            row += len(group)
        self.groups = staying
        starting = self._start(room=self._max_batch - len(rows))
        if len(rows) < row or starting:
            self._optimizer.keep(rows)
            self.groups += starting
            self._compose([search for group in starting for search in group])
        return bool(self.groups)

    def _ended(self, group: Sequence[Search]) -> bool:
        first = group[0]
        if self._settled(group) and not self._astray(group):
            for search in group:
                search.step = search.text_steps
        return first.error is not None or first.step >= _last_step(first, noisy=self._noisy)

    def _settled(self, group: Sequence[Search]) -> bool:
        return not self._noisy and all(search.settled or search.converged for search in group)

    def _astray(self, group: Sequence[Search]) -> bool:
        return self._settled(group) and any(search.astray for search in group)

    def _start(self, *, room: int) -> list[list[Search]]:
        """The next groups that fit, ready to run; one that is too large for any room runs alone."""
        starting: list[list[Search]] = []
        while self._waiting and (len(self._waiting[0]) <= room or not (self.groups or starting)):
            if self._waiting[0][0].prompts is None:
                self._encode_ahead()
            group = self._waiting.popleft()
            self._check(group)
            if self._noisy and group[0].error is None:
                _prepare(self._pipeline, group)
            if group[0].error is None:
                starting.append(group)
                room -= len(group)
        return starting

    def _encode_ahead(self) -> None:
        """The prompts of the next searches in one pass, which costs far less than one for each that starts."""
        chunk: list[Search] = []
        for group in self._waiting:
            if chunk and len(chunk) + len(group) > self._max_batch:
                break
            chunk += group
        parts = PromptBatch(self._pipeline, chunk, full_length=self._noisy).split()
        for search, part in zip(chunk, parts, strict=True):
            search.prompts, search.hidden = part, part.hidden[0]

    def _compose(self, starting: Sequence[Search]) -> None:
        prompts = [search.prompts for search in self._searches if search.prompts]
        self._prompts = PromptBatch.join(prompts) if prompts else None
        if starting:
            rates = torch.tensor([search.edit.settings.learning_rate for search in starting])
            deltas = torch.stack([search.delta for search in starting])  # (e, D)
            radii = torch.stack([search.radius for search in starting])
            self._optimizer.join(deltas, learning_rate=rates.to(deltas.device), radius=radii)

    def _check(self, group: Sequence[Search]) -> None:
        first = group[0]
        running = first.error is None and first.step < _last_step(first, noisy=self._noisy)
        if running and self._cancelled and self._cancelled(first.index):
            _stop(group, Cancelled(f"cancelled after {first.step} steps"))

    def step(self) -> None:
        """One step of every search; what comes of it is left in the search."""
        prompts, optimizer, searches = self._prompts, self._optimizer, self._searches
        assert prompts is not None
        with torch.enable_grad():
            deltas = optimizer.points.detach().requires_grad_()  # (e, D)
            encodings = prompts.encode(deltas)
            text = prompts.text_losses(encodings)  # (e,)
            losses = text * prompts.text_weights + prompts.regulariser(deltas)
            total = losses.sum()
            noise = torch.zeros_like(losses)
            if self._noisy:
                context = Condition.of(encodings)
                noise, pull = _noise_losses(self._pipeline, searches, prompts, context)
                total = total + context.dot(pull)
            # Rows share nothing but weights that take no gradient: a loss that is not finite spoils its own δ alone.
            (gradients,) = torch.autograd.grad(total, deltas)
        with torch.no_grad():
            taken = optimizer.step(losses.detach() + noise, gradients, prompts.clamp)
        self._record(text.tolist(), noise.tolist(), taken.tolist())

    def _record(self, text: Sequence[float], noise: Sequence[float], taken: Sequence[bool]) -> None:
        optimizer, searches = self._optimizer, self._searches
        losses, converged = optimizer.losses.tolist(), optimizer.converged.tolist()
        for row, search in enumerate(searches):
            search.step += 1
            search.delta = optimizer.found[row]
            search.converged = converged[row]
            if taken[row] or not search.losses:  # a point that the line search passed over says nothing of progress
                search.losses.append(losses[row])
            if search.uses_text:
                search.text_losses.append(text[row] if taken[row] or not search.text_losses else search.text_losses[-1])
            if self._noisy:
                search.noise_losses.append(noise[row])
        for group in self.groups:
            if not all(math.isfinite(search.losses[-1]) for search in group):
                _stop(
                    group,
                    OptimizationDiverged(
                        f"the loss is not finite at step {group[0].step}: lower learning_rate, or check the weights"
                    ),
                )


def _prepare(pipeline: EditablePipeline, group: Sequence[Search]) -> None:
    try:
        for search in group:
            search.prepare(pipeline)
    except EditingError as error:
        _stop(group, error)


def _noise_losses(
    pipeline: EditablePipeline, running: Sequence[Search], prompts: PromptBatch, context: Condition
) -> tuple[Tensor, Condition]:
    """L_noise (e,), and its gradient with respect to the context of the p prompts: Eq. 3 and 4.

    The U-Net runs on a few latents at a time and is differentiated at once, so that its activations are never all
    in memory; the gradient goes on into the encoders in one piece.
    """
    leaf = context.map(lambda tensor: tensor.detach().requires_grad_())
    pull = leaf.map(lambda tensor: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False))
    drawn = [search.noise.draw() for search in running if search.noise]
    noisy = torch.cat([batch.noisy for batch in drawn])  # (b, c, h, w)
    timesteps = torch.cat([batch.timesteps for batch in drawn])  # (b,)
    target = torch.cat([batch.target for batch in drawn])
    prompt = torch.cat([first + batch.templates for first, batch in zip(prompts.first, drawn, strict=True)])
    size = torch.tensor([len(batch.timesteps) for batch in drawn], device=prompt.device)
    owner = torch.arange(len(drawn), device=prompt.device).repeat_interleave(size)
    share = 1 / size[owner]

    def differentiate(part: slice) -> Tensor:
        prediction = pipeline.predict(noisy[part], timesteps[part], leaf[prompt[part]])
        errors = (prediction - target[part]).square().mean((1, 2, 3)) * share[part]
        gradients = torch.autograd.grad(errors.sum(), leaf.tensors)
        for total, gradient in zip(pull.tensors, gradients, strict=True):
            total.add_(gradient)
        return errors.detach()

    errors = torch.cat(pipeline.unet_chunks.split(len(noisy), differentiate))
    return torch.zeros(len(drawn), device=prompt.device).index_add_(0, owner, errors), pull


def _stop(group: Iterable[Search], error: EditingError) -> None:
    for search in group:
        search.error = error


def _progress(group: Sequence[Search]) -> StageOneProgress:
    shares = [search.share for search in group]
    text, noise = (
        weigh_losses([getattr(search, name)[-1:] for search in group], shares)
        for name in ("text_losses", "noise_losses")
    )
    return StageOneProgress(
        edit_index=group[0].index,
        step=group[0].step,
        steps=group[0].edit.settings.optimization_steps,
        text_loss=text[-1] if text else None,
        noise_loss=noise[-1] if noise else None,
    )


def _outcome(pipeline: EditablePipeline, group: Sequence[Search]) -> EditValue | EditingError:
    if group[0].error:
        return group[0].error
    if not all(search.delta.isfinite().all() for search in group):
        return OptimizationDiverged("δ is not finite after the last step: lower learning_rate")
    values = [_value(pipeline, search) for search in group]
    return values[0] if len(values) == 1 else mix(values, [search.share for search in group])


def _value(pipeline: EditablePipeline, search: Search) -> EditValue:
    parts = zip(
        pipeline.encoders, search.layers, search.delta.split(search.widths), search.hidden.split(search.widths),
        strict=True,
    )  # fmt: skip
    return EditValue(
        {
            encoder.name: EncoderValue(layer, delta.cpu().clone(), hidden.cpu().clone())
            for encoder, layer, delta, hidden in parts
        },
        text_losses=tuple(search.text_losses),
        noise_losses=tuple(search.noise_losses),
    )
