"""One δ being looked for, and the prompts in which it acts. The mechanics of stage I; the loop is in `values`.

Shapes: e searches in a batch, p prompts (all templates of all searches), s positions, d the encoder's width, and in
a pipeline of several encoders D the sum of their widths: a search has one δ for each, side by side.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from editing.edits import ConceptEdit, ReferenceImages
from editing.encoders.clip import EditableEncoder, Encoding
from editing.errors import EditingError, InvalidEdit
from editing.pipelines import EditablePipeline
from editing.prompts import SubjectPosition, build_destination_prompts, validate_edit
from editing.stage_one.noise import DestinationNoise, NoiseSource, ReferenceNoise

_WINDOW = 3  # steps over which the loss must fall
_STARTS = (1.0, 0.3, 0.1)  # first steps of L-BFGS, in ‖h‖: a search that one leads nowhere starts again with the next
_NOWHERE = 0.1  # of the first loss is left


@dataclass(eq=False)
class Search:
    """The search for one δ: an edit, or one prompt of a balance."""

    index: int
    edit: ConceptEdit
    share: float
    layers: tuple[int, ...]
    """L of each encoder."""
    positions: tuple[tuple[SubjectPosition, ...], ...]
    """For each encoder, one for each template."""
    destinations: list[str]
    """The destination in each template; none for reference images."""
    widths: tuple[int, ...]
    """d of each encoder."""
    delta: Tensor
    """(D,) float32: as far as it has come."""
    hidden: Tensor
    """(D,) float32"""
    step: int = 0
    """Steps done."""
    start: int = 0
    """How many times it has started again."""
    best: tuple[float, float, Tensor] | None = None
    """Of the starts before: the loss, the text loss and δ."""
    prompts: "PromptBatch | None" = None
    """Its own, while it runs or is about to."""
    noise: NoiseSource | None = None
    losses: list[float] = field(default_factory=list)
    """The whole loss at each point that was taken."""
    converged: bool = False
    """Whether nothing lowers the loss any more."""
    text_losses: list[float] = field(default_factory=list)
    noise_losses: list[float] = field(default_factory=list)
    error: EditingError | None = None

    @property
    def uses_text(self) -> bool:
        return self.edit.objective != "noise"

    @property
    def compared(self) -> list[str | None]:
        """What each template's prompt is compared with: the destination in it, or nothing."""
        return [*self.destinations] if self.uses_text else [None] * len(self.edit.templates)

    @property
    def text_weight(self) -> float:
        return {"text": 1.0, "noise": 0.0, "hybrid": self.edit.settings.text_weight}[self.edit.objective]

    @property
    def text_steps(self) -> int:
        """How many steps, the first, need no U-Net."""
        settings = self.edit.settings
        warm = min(settings.warmup_steps, settings.optimization_steps * 4 // 5)
        return {"text": settings.optimization_steps, "noise": 0, "hybrid": warm}[self.edit.objective]

    @property
    def settled(self) -> bool:
        """Whether its last steps together lowered the loss by less than its tolerance. Never where that is 0: Adam's
        losses rise now and then."""
        losses, tolerance = self.losses, self.edit.settings.tolerance
        return 0 < tolerance and len(losses) > _WINDOW and losses[-1 - _WINDOW] - losses[-1] < tolerance * losses[0]

    @property
    def radius(self) -> Tensor:
        """The length of the first step of L-BFGS."""
        return self.hidden.norm() * _STARTS[self.start]

    @property
    def astray(self) -> bool:
        """Whether L-BFGS settled with most of its first loss left, and another start may do better: a first step over
        the slope can end on a plateau, where nothing says which way is down."""
        again = self.edit.settings.text_optimizer == "lbfgs" and self.start + 1 < len(_STARTS)
        return again and self.losses[-1] > _NOWHERE * self.losses[0]

    def start_again(self) -> None:
        """Go back to δ = 0, remembering what was found; one that is not astray goes on from where it is."""
        if self.astray:
            if self.best is None or self.losses[-1] < self.best[0]:
                self.best = self.losses[-1], self.text_losses[-1], self.delta
            self.start += 1
            self.delta = torch.zeros_like(self.delta)
        self.losses, self.converged = [], False

    def settle(self) -> None:
        """Take the best of all starts."""
        if self.best and self.losses and self.best[0] < self.losses[-1]:
            _, text, self.delta = self.best
            self.text_losses.append(text)
        self.best = None

    def prepare(self, pipeline: EditablePipeline) -> None:
        """Draw what the noise loss compares, from the edit's seed."""
        settings, generator = self.edit.settings, Generator().manual_seed(self.edit.settings.seed)
        if self.edit.objective == "text":
            return
        if isinstance(self.edit.destination, ReferenceImages):
            images, templates = self.edit.destination.images, len(self.edit.templates)
            self.noise = ReferenceNoise(pipeline, images, templates=templates, settings=settings, generator=generator)
        else:
            self.noise = DestinationNoise(pipeline, self.destinations, settings=settings, generator=generator)

    def release(self) -> None:
        """Let go of what only a running search needs, which is the bulk of the memory."""
        self.prompts = self.noise = None


def build_optimizations(edit: ConceptEdit, pipeline: EditablePipeline, *, index: int) -> list[Search]:
    """The searches of one edit, the call's `index`-th. Raises `InvalidEdit` where a prompt cannot be placed."""
    for encoder in pipeline.encoders:
        validate_edit(edit, encoder.tokenizer)
    layers = _layers(edit, pipeline)
    positions = tuple(
        tuple(encoder.tokenizer.locate(template, edit.source) for template in edit.templates)
        for encoder in pipeline.encoders
    )
    widths = tuple(encoder.width for encoder in pipeline.encoders)
    by_template = [build_destination_prompts(edit.destination, template) for template in edit.templates]
    shares = list(by_template[0].values()) or [1.0]
    columns = list(zip(*by_template, strict=True)) or [()]  # one for each prompt of a balance, one for anything else
    return [
        Search(
            index=index,
            edit=edit,
            share=share,
            layers=layers,
            positions=positions,
            destinations=list(prompts),
            widths=widths,
            delta=torch.zeros(sum(widths), device=pipeline.device),
            hidden=torch.zeros(sum(widths), device=pipeline.device),
        )
        for share, prompts in zip(shares, columns, strict=True)
    ]


def _layers(edit: ConceptEdit, pipeline: EditablePipeline) -> tuple[int, ...]:
    asked, lasts = edit.settings.layer, tuple(encoder.value_layer for encoder in pipeline.encoders)
    if asked is None:
        return lasts
    if len(lasts) > 1:
        raise InvalidEdit(
            "this pipeline has several text encoders, which one layer cannot fit: leave it out",
            pointer="/settings/layer",
        )
    if asked > lasts[0]:
        raise InvalidEdit(f"layer must be at most {lasts[0]}, the last but one", pointer="/settings/layer")
    return (asked,)


class PromptBatch:
    """The source prompts of the searches that share a step, with their states after layer L of each encoder.

    The states are computed once for a search: `split` gives each its own, and `join` puts those that run together.
    """

    _PER_SEARCH = ("hidden", "text_weights", "_decay", "_limits")

    def __init__(
        self, pipeline: EditablePipeline, searches: Sequence[Search], *, full_length: bool | None = None
    ) -> None:
        """`full_length`: with the padding, which the U-Net reads too; by default where any of the searches needs it."""
        device = pipeline.device
        settings = [search.edit.settings for search in searches]
        if full_length is None:
            full_length = any(search.edit.objective != "text" for search in searches)
        self._index([len(search.edit.templates) for search in searches], device=device)
        self._sources = [
            _SourcePrompts.of(encoder, searches, number=number, full_length=full_length)
            for number, encoder in enumerate(pipeline.encoders)
        ]
        self._widths = searches[0].widths
        self.hidden = torch.cat([self._mean(sources.at_subject()) for sources in self._sources], dim=1)
        """h (e, D) float32, the mean over the templates."""

        self.text_weights = torch.tensor([search.text_weight for search in searches], device=device)  # (e,)
        self._decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
        lengths = torch.stack([hidden.norm(dim=1) for hidden in self.hidden.split(self._widths, 1)], 1)
        clamps = torch.tensor([setting.max_delta_norm for setting in settings], device=device)
        self._limits = lengths * clamps[:, None]  # (e, encoders)

    def split(self) -> list["PromptBatch"]:
        """One for each search."""
        parts = []
        for row, (first, count) in enumerate(zip(self.first.tolist(), self._counts, strict=True)):
            part = copy.copy(self)
            part._index([count], device=self.first.device)
            part._sources = [sources.of_prompts(slice(first, first + count)) for sources in self._sources]
            for name in self._PER_SEARCH:
                setattr(part, name, getattr(self, name)[row : row + 1])
            parts.append(part)
        return parts

    @classmethod
    def join(cls, batches: Sequence["PromptBatch"]) -> "PromptBatch":
        """The searches of batches of the same layers, in order."""
        whole = copy.copy(batches[0])
        whole._index([count for batch in batches for count in batch._counts], device=whole.first.device)
        whole._sources = [
            _SourcePrompts.join(sources) for sources in zip(*(batch._sources for batch in batches), strict=True)
        ]
        for name in cls._PER_SEARCH:
            setattr(whole, name, torch.cat([getattr(batch, name) for batch in batches]))
        return whole

    def _index(self, counts: list[int], *, device: torch.device) -> None:
        """Which search each prompt belongs to, from the number of prompts of each search."""
        self._counts = counts
        number = torch.tensor(counts, device=device)
        self.first = torch.tensor([0, *counts[:-1]], device=device).cumsum(0)  # (e,): each search's first prompt
        self._row = torch.arange(len(counts), device=device).repeat_interleave(number)
        self._share = 1 / number[self._row]  # (p,)

    def encode(self, deltas: Tensor) -> list[Encoding]:
        """What each encoder makes of the prompts with δ (e, D) in place."""
        parts = deltas[self._row].split(self._widths, dim=1)
        return [sources.encode(shift) for sources, shift in zip(self._sources, parts, strict=True)]

    def text_losses(self, encodings: Sequence[Encoding]) -> Tensor:
        """L_txt (e,), Eq. 2: the mean square at EOS, summed over the encoders; 0 where a search has no text loss."""
        errors = [
            (encoding.said.float() - sources.targets).square().mean(1)  # (p,)
            for encoding, sources in zip(encodings, self._sources, strict=True)
        ]
        losses = self._mean(torch.stack(errors).sum(0))
        return torch.where(self.text_weights > 0, losses, torch.zeros_like(losses))

    def regulariser(self, deltas: Tensor) -> Tensor:
        """weight_decay · ‖δ‖²/‖h‖² (e,), summed over the encoders."""
        ratios = [
            delta.square().sum(1) / hidden.square().sum(1)
            for delta, hidden in zip(deltas.split(self._widths, 1), self.hidden.split(self._widths, 1), strict=True)
        ]
        return self._decay * torch.stack(ratios).sum(0)

    def clamp(self, deltas: Tensor) -> Tensor:
        """δ (e, D), in each encoder no longer than its edit's `max_delta_norm` times ‖h‖."""
        parts = [
            delta * (limit / delta.norm(dim=1).clamp_min(1e-12)).clamp(max=1)[:, None]
            for delta, limit in zip(deltas.split(self._widths, 1), self._limits.unbind(1), strict=True)
        ]
        return torch.cat(parts, 1)

    def _mean(self, rows: Tensor) -> Tensor:
        """(p, ·) to the mean over each search's templates, (e, ·)."""
        share = self._share.view(-1, *[1] * (rows.ndim - 1))
        return rows.new_zeros(len(self.first), *rows.shape[1:]).index_add(0, self._row, rows * share)


@dataclass(frozen=True)
class _SourcePrompts:
    """One encoder's states of the source prompts after its layer L, which no step changes."""

    encoder: EditableEncoder
    layer: int
    states: Tensor
    """(p, s, d)"""
    subject: Tensor
    """(p,): the last subject tokens"""
    ends: Tensor
    """(p,): EOS"""
    targets: Tensor
    """(p, ·) float32: what is said of the destinations; 0 where a search has no text loss."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, encoder: EditableEncoder, searches: Sequence[Search], *, number: int, full_length: bool
    ) -> "_SourcePrompts":
        """Of the pipeline's encoder of this number."""
        positions = [position for search in searches for position in search.positions[number]]
        layer = searches[0].layers[number]
        states = encoder.embed(encoder.ids([position.ids for position in positions], full_length=full_length))
        return cls(
            encoder,
            layer,
            states=encoder.advance(states, start=0, stop=layer + 1),
            subject=torch.tensor([position.last_subject_index for position in positions], device=encoder.device),
            ends=torch.tensor([position.eos_index for position in positions], device=encoder.device),
            targets=_said(encoder, [prompt for search in searches for prompt in search.compared]),
        )

    @classmethod
    def join(cls, parts: Sequence["_SourcePrompts"]) -> "_SourcePrompts":
        """The prompts of all parts. Shorter ones are padded: attention does not look ahead."""
        longest = max(part.states.shape[1] for part in parts)
        padded = [F.pad(part.states, (0, 0, 0, longest - part.states.shape[1])) for part in parts]
        return replace(
            parts[0],
            states=torch.cat(padded),
            subject=torch.cat([part.subject for part in parts]),
            ends=torch.cat([part.ends for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
        )

    def of_prompts(self, prompts: slice) -> "_SourcePrompts":
        return replace(
            self,
            states=self.states[prompts],
            subject=self.subject[prompts],
            ends=self.ends[prompts],
            targets=self.targets[prompts],
        )

    @property
    def _at_subject(self) -> tuple[Tensor, Tensor]:
        return torch.arange(len(self.subject), device=self.subject.device), self.subject

    def at_subject(self) -> Tensor:
        """(p, d) float32"""
        return self.states[self._at_subject].float()

    def encode(self, shift: Tensor) -> Encoding:
        """With the shifts (p, d) added at the last subject tokens."""
        states = self.states.index_put(self._at_subject, shift.to(self.states.dtype), accumulate=True)
        return self.encoder.read(states, start=self.layer + 1, ends=self.ends)


def _said(encoder: EditableEncoder, prompts: Sequence[str | None]) -> Tensor:
    """What is said of each prompt, (p, ·) float32; zeros where there is none."""
    given = [prompt for prompt in prompts if prompt is not None]
    said = torch.zeros(len(prompts), encoder.pooled_dim, device=encoder.device)
    if given:
        ids = [encoder.tokenizer.encode(prompt).ids for prompt in given]
        places = torch.tensor([prompt is not None for prompt in prompts], device=encoder.device)
        said[places] = encoder.encoding(ids, full_length=False).said.float()
    return said
