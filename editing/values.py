"""Stage I: for each edit, the value vector that makes the source be drawn as the destination. Many edits in one batch.

δ (d,) is added to the output of layer L at the last subject token of every template prompt, and optimised alone:

    loss = L_noise + text_weight · L_txt + weight_decay · ‖δ‖²/‖h‖²

L_txt (Eq. 2) compares what the encoder says at EOS with what it says for the destination; L_noise (Eq. 3, 4) what the
U-Net makes of it. Only the layers after L run in a step: the states up to L are computed once.

Shapes: e searches in a batch, p prompts (all templates of all searches), s positions, d width.
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
from torch import Tensor, nn

from editing import ENGINE_VERSION
from editing.concepts import ConceptEdit, ReferenceImages
from editing.errors import Cancelled, EditingError, InvalidEdit, OptimisationDiverged
from editing.noise import UNET_BATCH, DestinationNoise, NoiseSource, ReferenceNoise
from editing.pipelines import EditablePipeline
from editing.prompts import SubjectPosition, TokenizedPrompt, destination_prompts, validate_edit


@dataclass(frozen=True, eq=False)
class Value:
    """What stage I found for one edit: fc2's memories shall make the state after `layer` be `hidden + delta`."""

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
        """One file with both vectors and, as one JSON string, everything else."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("delta", "hidden")}
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
    waiting: list[list[_Search]] = []
    for index, edit in enumerate(edits):
        try:
            waiting.append(_searches(pipeline, edit, index=index))
        except EditingError as error:
            outcomes[index] = error
    for batch in _batches(waiting, max_batch=max_batch):
        for search in batch:
            search.prepare(pipeline, cancelled=cancelled)
        _optimize(pipeline, batch, progress=progress, cancelled=cancelled)
        for group in _by_edit(batch):
            outcomes[group[0].index] = _outcome(pipeline, group)
            for search in group:
                search.noise = None  # its bank is the bulk of the memory
    return [outcome for outcome in outcomes if outcome is not None]


@dataclass(eq=False)
class _Search:
    """The search for one δ: an edit, or one prompt of a balance."""

    index: int
    edit: ConceptEdit
    share: float
    layer: int
    positions: list[SubjectPosition]
    """One for each template."""
    destinations: list[TokenizedPrompt]
    """The same for the destination; none for reference images."""
    delta: nn.Parameter
    hidden: Tensor
    noise: NoiseSource | None = None
    text_losses: list[float] = field(default_factory=list)
    noise_losses: list[float] = field(default_factory=list)
    error: EditingError | None = None

    @property
    def uses_text(self) -> bool:
        return self.edit.objective != "noise"

    @property
    def text_weight(self) -> float:
        return {"text": 1.0, "noise": 0.0, "hybrid": self.edit.settings.text_weight}[self.edit.objective]

    def uses_noise(self, step: int) -> bool:
        settings, objective = self.edit.settings, self.edit.objective
        start = min(settings.warm_start, settings.steps * 4 // 5) if objective == "hybrid" else 0
        return objective != "text" and step >= start

    def runs(self, step: int) -> bool:
        return self.error is None and step < self.edit.settings.steps

    def prepare(self, pipeline: EditablePipeline, *, cancelled: Callable[[int], bool] | None) -> None:
        """Draw what the noise loss needs."""
        settings = self.edit.settings
        if self.edit.objective == "text":
            return
        if cancelled and cancelled(self.index):
            self.error = Cancelled("cancelled before its first step")
            return
        generator = torch.Generator().manual_seed(settings.seed)
        try:
            if isinstance(self.edit.destination, ReferenceImages):
                self.noise = ReferenceNoise(
                    pipeline,
                    self.edit.destination.images,
                    templates=len(self.positions),
                    settings=settings,
                    generator=generator,
                )
            else:
                self.noise = DestinationNoise(pipeline, self.destinations, settings=settings, generator=generator)
        except EditingError as error:
            self.error = error


def _searches(pipeline: EditablePipeline, edit: ConceptEdit, *, index: int) -> list[_Search]:
    tokenizer = pipeline.tokenizer
    validate_edit(edit, tokenizer)
    encoder = pipeline.encoder
    layer = encoder.value_layer if edit.settings.layer is None else edit.settings.layer
    if layer > encoder.value_layer:
        raise InvalidEdit(f"layer must be at most {encoder.value_layer}, the last but one", pointer="/settings/layer")
    positions = [tokenizer.locate(template, edit.source) for template in edit.templates]
    by_template = [destination_prompts(edit.destination, template) for template in edit.templates]
    shares = list(by_template[0].values()) or [1.0]
    columns = list(zip(*by_template, strict=True)) or [()]  # one for each prompt of a balance, one for anything else
    return [
        _Search(
            index=index,
            edit=edit,
            share=share,
            layer=layer,
            positions=positions,
            destinations=[tokenizer.encode(prompt) for prompt in prompts],
            delta=nn.Parameter(torch.zeros(encoder.width, device=encoder.device)),
            hidden=torch.zeros(encoder.width, device=encoder.device),
        )
        for share, prompts in zip(shares, columns, strict=True)
    ]


def _batches(waiting: list[list[_Search]], *, max_batch: int) -> Iterator[list[_Search]]:
    """Searches that can share a batch: of one layer, and not a quick text-only one among those that need the U-Net."""
    groups: dict[tuple[int, bool], list[list[_Search]]] = {}
    for searches in waiting:
        groups.setdefault((searches[0].layer, searches[0].edit.objective == "text"), []).append(searches)
    for group in groups.values():
        batch: list[_Search] = []
        for searches in group:
            if batch and len(batch) + len(searches) > max_batch:
                yield batch
                batch = []
            batch = batch + searches
        yield batch


class _Prompts:
    """The source prompts of the searches that share a step, with their states after layer L."""

    def __init__(self, pipeline: EditablePipeline, searches: Sequence[_Search]) -> None:
        self._encoder = encoder = pipeline.encoder
        self._layer = searches[0].layer
        device = encoder.device
        positions = [position for search in searches for position in search.positions]
        counts = [len(search.positions) for search in searches]
        settings = [search.edit.settings for search in searches]
        full_length = any(search.edit.objective != "text" for search in searches)  # the U-Net reads the padding too

        self.first = torch.tensor([0, *counts[:-1]], device=device).cumsum(0)  # (e,): each search's first prompt
        self._row = torch.arange(len(searches), device=device).repeat_interleave(torch.tensor(counts, device=device))
        self._share = 1 / torch.tensor(counts, device=device)[self._row]  # (p,)
        self._prompt = torch.arange(len(positions), device=device)
        self._subject = torch.tensor([position.last_subject_index for position in positions], device=device)
        self._eos = torch.tensor([position.eos_index for position in positions], device=device)
        with torch.no_grad():
            ids = encoder.ids([position.ids for position in positions], full_length=full_length)
            self._states = encoder.advance(encoder.embed(ids), start=0, stop=self._layer + 1)  # (p, s, d)
        self._hidden = self._mean(self._states[self._prompt, self._subject].float())

        self.text_weights = torch.tensor([search.text_weight for search in searches], device=device)  # (e,)
        self._decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
        self._targets = torch.zeros(len(positions), encoder.width, device=device)  # (p, d)
        destinations = [destination for search in searches if search.uses_text for destination in search.destinations]
        if destinations:
            with torch.no_grad():
                said = encoder.encode([destination.ids for destination in destinations], full_length=False)
            ends = torch.tensor([destination.eos_index for destination in destinations], device=device)
            self._targets[self.text_weights[self._row] > 0] = said[torch.arange(len(ends), device=device), ends].float()

    def hidden(self) -> Tensor:
        """h (e, d) float32, the mean over the templates."""
        return self._hidden

    def context(self, deltas: Tensor) -> Tensor:
        """What the U-Net reads with δ (e, d) in place, (p, s, d)."""
        shift = deltas[self._row].to(self._states.dtype)
        states = self._states.index_put((self._prompt, self._subject), shift, accumulate=True)
        encoder = self._encoder
        return encoder.finish(encoder.advance(states, start=self._layer + 1, stop=encoder.n_layers))

    def text_losses(self, context: Tensor) -> Tensor:
        """L_txt (e,), Eq. 2: the mean square at EOS; 0 where a search has no text loss."""
        said = context[self._prompt, self._eos].float()  # (p, d)
        losses = self._mean((said - self._targets).square().mean(1))
        return torch.where(self.text_weights > 0, losses, torch.zeros_like(losses))

    def regulariser(self, deltas: Tensor) -> Tensor:
        """(e,)"""
        return self._decay * deltas.square().sum(1) / self._hidden.square().sum(1)

    def _mean(self, rows: Tensor) -> Tensor:
        """(p, ·) to the mean over each search's templates, (e, ·)."""
        share = self._share.view(-1, *[1] * (rows.ndim - 1))
        return rows.new_zeros(len(self.first), *rows.shape[1:]).index_add(0, self._row, rows * share)


def _optimize(
    pipeline: EditablePipeline,
    searches: Sequence[_Search],
    *,
    progress: Callable[[StageOneProgress], None] | None,
    cancelled: Callable[[int], bool] | None,
) -> None:
    """Adam on every δ of a batch; what comes of each is left in its search."""
    optimizer = torch.optim.Adam([{"params": [s.delta], "lr": s.edit.settings.learning_rate} for s in searches])
    running: list[_Search] = []
    for step in range(max(search.edit.settings.steps for search in searches)):
        for group in _by_edit(searches):
            if cancelled and group[0].runs(step) and cancelled(group[0].index):
                _stop(group, Cancelled(f"cancelled after {step} steps"))
        still = [search for search in searches if search.runs(step)]
        if not still:
            return
        if still != running:
            running = still
            prompts = _Prompts(pipeline, running)
            for search, hidden in zip(running, prompts.hidden(), strict=True):
                search.hidden = hidden
            limits = torch.stack([search.hidden.norm() * search.edit.settings.clamp for search in running])  # (e,)

        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            deltas = torch.stack([search.delta for search in running])  # (e, d)
            context = prompts.context(deltas)  # (p, s, d)
            text = prompts.text_losses(context)  # (e,)
            noise, pull = _noise_losses(pipeline, running, prompts, context, step=step)
            losses = text * prompts.text_weights + prompts.regulariser(deltas)
            healthy = (losses + noise).isfinite()
            (losses[healthy].sum() + (context.float() * pull).sum()).backward()
        _record(running, text.tolist(), noise.tolist(), healthy.tolist(), step=step)
        optimizer.step()
        with torch.no_grad():
            for search, limit in zip(running, limits, strict=True):
                search.delta.mul_((limit / search.delta.norm().clamp_min(1e-12)).clamp(max=1))
        if progress:
            for group in _by_edit(running):
                progress(_progress(group, step=step))


def _noise_losses(
    pipeline: EditablePipeline, running: Sequence[_Search], prompts: _Prompts, context: Tensor, *, step: int
) -> tuple[Tensor, Tensor]:
    """L_noise (e,), and its gradient with respect to the context (p, s, d): Eq. 3 and 4.

    The U-Net runs on a few latents at a time and is differentiated at once, so that its activations are never all
    in memory; the gradient goes on into the encoder in one piece.
    """
    losses = torch.zeros(len(running), device=context.device)
    drawn = [
        (row, search.noise.draw()) for row, search in enumerate(running) if search.noise and search.uses_noise(step)
    ]
    if not drawn:
        return losses, torch.zeros_like(context)
    leaf = context.detach().requires_grad_()
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
    assert leaf.grad is not None
    return losses, leaf.grad.float()


def _record(
    running: Sequence[_Search], text: list[float], noise: list[float], healthy: list[bool], *, step: int
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


def _stop(group: Iterable[_Search], error: EditingError) -> None:
    for search in group:
        search.error = error
        search.delta.grad = None  # the optimiser passes it over


def _by_edit(searches: Iterable[_Search]) -> list[list[_Search]]:
    return [list(group) for _, group in groupby(searches, key=lambda search: search.index)]


def _mean_losses(group: Sequence[_Search], name: Literal["text_losses", "noise_losses"]) -> tuple[float, ...]:
    """Per step, the weighted mean over the prompts of a balance."""
    shares = [search.share for search in group]
    steps = zip(*(getattr(search, name) for search in group), strict=True)
    return tuple(sum(map(mul, losses, shares)) for losses in steps)


def _progress(group: Sequence[_Search], *, step: int) -> StageOneProgress:
    text, noise = _mean_losses(group, "text_losses"), _mean_losses(group, "noise_losses")
    return StageOneProgress(
        edit_index=group[0].index,
        step=step + 1,
        steps=group[0].edit.settings.steps,
        text_loss=text[-1] if text else None,
        noise_loss=noise[-1] if noise else None,
    )


def _outcome(pipeline: EditablePipeline, group: Sequence[_Search]) -> Value | EditingError:
    first = group[0]
    if first.error:
        return first.error
    return Value(
        encoder=pipeline.encoder.name,
        layer=first.layer,
        delta=sum((s.share * s.delta.detach() for s in group), torch.zeros_like(first.hidden)).cpu(),
        hidden=first.hidden.cpu(),
        text_losses=_mean_losses(group, "text_losses"),
        noise_losses=_mean_losses(group, "noise_losses"),
        seed=first.edit.settings.seed,
        settings=dataclasses.asdict(first.edit.settings),
    )
