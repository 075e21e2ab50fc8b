"""Stage I: for each edit, the value vector that makes the source be drawn as the destination. Many edits in one batch.

δ (d,) is added to the output of layer L at the last subject token of every template prompt, and optimised alone:

    loss = L_noise + text_weight · L_txt + weight_decay · ‖δ‖²/‖h‖²

L_txt (Eq. 2) compares what the encoder says at EOS with what it says for the destination; L_noise (Eq. 3, 4) what the
U-Net makes of it. Only the layers after L run in a step: the states up to L are computed once.

A pipeline of several encoders has a δ in each, at a layer of its own, and one loss: they are found together.

Shapes: e searches in a batch, p prompts (all templates of all searches), s positions, d width of an encoder, D of all.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import mul
from typing import Any, Literal, Self

import torch
from safetensors.torch import save
from torch import Tensor

from editing import ENGINE_VERSION
from editing.concepts import ConceptEdit
from editing.errors import Cancelled, EditingError, OptimisationDiverged
from editing.noise import UNET_BATCH
from editing.pipelines import Condition, EditablePipeline
from editing.search import PromptBatch, Search, searches_of


@dataclass(frozen=True, eq=False)
class Value:
    """What stage I found for one edit: fc2's memories shall make the state after `layer` be `hidden + delta`.

    The losses are the whole edit's, whichever encoder the vectors are of.
    """

    encoder: str
    layer: int
    delta: Tensor
    """δ (d,) float32, on the CPU"""
    hidden: Tensor
    """h (d,) float32: the state before any edit, the mean over the templates"""
    text_losses: tuple[float, ...] = ()
    """Per step, before it; empty where the objective has none."""
    noise_losses: tuple[float, ...] = ()
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine_version: str = ENGINE_VERSION
    others: tuple["Value", ...] = ()
    """What was found together with this for the pipeline's other encoders."""

    @property
    def parts(self) -> tuple["Value", ...]:
        """One for each encoder of the pipeline, this one first."""
        return self, *self.others

    @property
    def delta_norm(self) -> float:
        return float(self.delta.norm())

    @property
    def hidden_norm(self) -> float:
        return float(self.hidden.norm())

    def to_bytes(self) -> bytes:
        """δ, then h, as little-endian float32: 8·d bytes."""
        return torch.cat([self.delta, self.hidden]).numpy().astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, content: bytes, *, encoder: str, layer: int, **rest: Any) -> Self:
        """The reverse of `to_bytes`."""
        if not content or len(content) % 8:
            raise EditingError(f"{len(content)} bytes are no value: δ and h are float32 of one width")
        both = torch.frombuffer(bytearray(content), dtype=torch.float32)
        delta, hidden = both.chunk(2)
        return cls(encoder=encoder, layer=layer, delta=delta.clone(), hidden=hidden.clone(), **rest)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta, "hidden": self.hidden}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, encoder: str, layer: int, **rest: Any) -> Self:
        return cls(encoder=encoder, layer=layer, delta=tensors["delta"], hidden=tensors["hidden"], **rest)

    def to_safetensors(self) -> bytes:
        """One file with both vectors and, as one JSON string, everything else; nothing of the other encoders."""
        left_out = ("delta", "hidden", "others")
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        return save(self.to_tensors(), metadata={"value": json.dumps(plain, sort_keys=True)})


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
) -> list[Value | EditingError]:
    """Optimise the value of every edit; one outcome per edit, in order.

    An edit that cannot be located, diverges or is cancelled has its error as its outcome and disturbs no other.
    `cancelled(edit_index)` is asked before every step, `progress` is called after it. `max_batch` bounds how many δ
    share a batch (a `Balance` has one for each of its prompts and is never split).

    What holds bit for bit: the same call on the same platform with the same number of threads gives the same values.
    Everything random comes from the edit's own seed, and its pictures and targets are made without the others; but
    the sums of a step run over the batch, so that with other edits beside it a value is the same within rounding.
    """
    outcomes: list[Value | EditingError | None] = [None] * len(edits)
    waiting: list[list[Search]] = []
    for index, edit in enumerate(edits):
        try:
            waiting.append(searches_of(edit, pipeline, index=index))
        except EditingError as error:
            outcomes[index] = error
    for batch in _batches(waiting, max_batch=max_batch):
        for group in _by_edit(batch):
            _prepare(pipeline, group, cancelled=cancelled)
        _optimize(pipeline, batch, progress=progress, cancelled=cancelled)
        for group in _by_edit(batch):
            outcomes[group[0].index] = _outcome(pipeline, group)
            for search in group:
                search.noise = None  # its bank is the bulk of the memory
    return [outcome for outcome in outcomes if outcome is not None]


def _prepare(pipeline: EditablePipeline, group: Sequence[Search], *, cancelled: Callable[[int], bool] | None) -> None:
    try:
        if cancelled and cancelled(group[0].index):
            raise Cancelled("cancelled before its first step")
        for search in group:
            search.prepare(pipeline)
    except EditingError as error:
        _stop(group, error)


def _batches(waiting: list[list[Search]], *, max_batch: int) -> Iterator[list[Search]]:
    """Searches that can share a batch: of the same layers, and no quick text-only one among those with a U-Net."""
    groups: dict[tuple[tuple[int, ...], bool], list[list[Search]]] = {}
    for searches in waiting:
        groups.setdefault((searches[0].layers, searches[0].edit.objective == "text"), []).append(searches)
    for group in groups.values():
        batch: list[Search] = []
        for searches in group:
            if batch and len(batch) + len(searches) > max_batch:
                yield batch
                batch = []
            batch = batch + searches
        yield batch


def _optimize(
    pipeline: EditablePipeline,
    searches: Sequence[Search],
    *,
    progress: Callable[[StageOneProgress], None] | None,
    cancelled: Callable[[int], bool] | None,
) -> None:
    """Adam on every δ of a batch; what comes of each is left in its search."""
    optimizer = torch.optim.Adam([{"params": [s.delta], "lr": s.edit.settings.learning_rate} for s in searches])
    running: list[Search] = []
    for step in range(max(search.edit.settings.steps for search in searches)):
        for group in _by_edit(searches):
            if cancelled and group[0].runs(step) and cancelled(group[0].index):
                _stop(group, Cancelled(f"cancelled after {step} steps"))
        still = [search for search in searches if search.runs(step)]
        if not still:
            return
        if still != running:
            running = still
            prompts = PromptBatch(pipeline, running)
            for search, hidden in zip(running, prompts.hidden, strict=True):
                search.hidden = hidden

        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            deltas = torch.stack([search.delta for search in running])  # (e, D)
            encodings = prompts.encode(deltas)
            context = Condition.of(encodings)
            text = prompts.text_losses(encodings)  # (e,)
            noise, pull = _noise_losses(pipeline, running, prompts, context, step=step)
            losses = text * prompts.text_weights + prompts.regulariser(deltas)
            # Rows share nothing but weights that take no gradient: a loss that is not finite spoils its own δ alone.
            (losses.sum() + context.dot(pull)).backward()
        healthy = (losses + noise).isfinite()
        _record(running, text.tolist(), noise.tolist(), healthy.tolist(), step=step)
        optimizer.step()
        for search in running:
            search.clamp()
        if progress:
            for group in _by_edit(running):
                progress(_progress(group, step=step))


def _noise_losses(
    pipeline: EditablePipeline, running: Sequence[Search], prompts: PromptBatch, context: Condition, *, step: int
) -> tuple[Tensor, Condition]:
    """L_noise (e,), and its gradient with respect to the context of the p prompts: Eq. 3 and 4.

    The U-Net runs on a few latents at a time and is differentiated at once, so that its activations are never all
    in memory; the gradient goes on into the encoders in one piece.
    """
    losses = torch.zeros(len(running), device=pipeline.device)
    drawn = [
        (row, search.noise.draw()) for row, search in enumerate(running) if search.noise and search.uses_noise(step)
    ]
    if not drawn:
        return losses, context.map(torch.zeros_like)
    leaf = context.map(lambda tensor: tensor.detach().requires_grad_())
    noisy = torch.cat([batch.noisy for _, batch in drawn])  # (b, c, h, w)
    timesteps = torch.cat([batch.timesteps for _, batch in drawn])  # (b,)
    target = torch.cat([batch.target for _, batch in drawn])
    prompt = torch.cat([prompts.first[row] + batch.templates for row, batch in drawn])
    owner = torch.tensor([row for row, batch in drawn for _ in batch.timesteps], device=losses.device)
    share = torch.tensor([1 / len(batch.timesteps) for _, batch in drawn for _ in batch.timesteps]).to(losses.device)
    for part in torch.arange(len(noisy), device=losses.device).split(UNET_BATCH):
        prediction = pipeline.predict(noisy[part], timesteps[part], leaf[prompt[part]])
        errors = (prediction - target[part]).square().mean((1, 2, 3)) * share[part]
        errors.sum().backward()
        losses.index_add_(0, owner[part], errors.detach())
    return losses, leaf.map(_gradient)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad.float()


def _record(
    running: Sequence[Search], text: list[float], noise: list[float], healthy: list[bool], *, step: int
) -> None:
    for search, text_loss, noise_loss in zip(running, text, noise, strict=True):
        if search.uses_text:
            search.text_losses.append(text_loss)
        if search.uses_noise(step):
            search.noise_losses.append(noise_loss)
    for group in _by_edit(search for search, fine in zip(running, healthy, strict=True) if not fine):
        _stop(
            [search for search in running if search.index == group[0].index],
            OptimisationDiverged(
                f"the loss is not finite at step {step + 1}: lower learning_rate, or check the weights"
            ),
        )


def _stop(group: Iterable[Search], error: EditingError) -> None:
    for search in group:
        search.stop(error)


def _by_edit(searches: Iterable[Search]) -> list[list[Search]]:
    return [list(group) for _, group in groupby(searches, key=lambda search: search.index)]


def _mean_losses(
    group: Sequence[Search], name: Literal["text_losses", "noise_losses"], *, since: int = 0
) -> tuple[float, ...]:
    """Per step, the weighted mean over the prompts of a balance."""
    shares = [search.share for search in group]
    steps = zip(*(getattr(search, name)[since:] for search in group), strict=True)
    return tuple(sum(map(mul, losses, shares)) for losses in steps)


def _progress(group: Sequence[Search], *, step: int) -> StageOneProgress:
    text, noise = (_mean_losses(group, name, since=-1) for name in ("text_losses", "noise_losses"))
    return StageOneProgress(
        edit_index=group[0].index,
        step=step + 1,
        steps=group[0].edit.settings.steps,
        text_loss=text[-1] if text else None,
        noise_loss=noise[-1] if noise else None,
    )


def _outcome(pipeline: EditablePipeline, group: Sequence[Search]) -> Value | EditingError:
    first = group[0]
    if first.error:
        return first.error
    delta = torch.stack([search.share * search.delta.detach() for search in group]).sum(0)
    if not delta.isfinite().all():
        return OptimisationDiverged("δ is not finite after the last step: lower learning_rate")
    parts = zip(
        pipeline.encoders, first.layers, delta.split(first.widths), first.hidden.split(first.widths), strict=True
    )
    value, *others = [
        Value(
            encoder=encoder.name,
            layer=layer,
            delta=own_delta.cpu().clone(),
            hidden=own_hidden.cpu().clone(),
            text_losses=_mean_losses(group, "text_losses"),
            noise_losses=_mean_losses(group, "noise_losses"),
            seed=first.edit.settings.seed,
            settings=dataclasses.asdict(first.edit.settings),
        )
        for encoder, layer, own_delta, own_hidden in parts
    ]
    return dataclasses.replace(value, others=tuple(others))
