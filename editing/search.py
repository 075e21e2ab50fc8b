"""One δ being looked for, and the prompts in which it acts. The mechanics of stage I; the loop is in `values`.

Shapes: e searches in a batch, p prompts (all templates of all searches), s positions, d the encoder's width, and in
a pipeline of several encoders D the sum of their widths: a search has one δ for each, side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from editing.concepts import ConceptEdit, ReferenceImages
from editing.encoders import EditableEncoder, Encoding
from editing.errors import EditingError, InvalidEdit
from editing.noise import DestinationNoise, NoiseSource, ReferenceNoise
from editing.pipelines import EditablePipeline
from editing.prompts import SubjectPosition, destination_prompts, validate_edit


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
    delta: nn.Parameter
    """(D,)"""
    hidden: Tensor
    """(D,)"""
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

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep ‖δ‖ of each encoder to at most `clamp`·‖h‖."""
        for delta, hidden in zip(self.delta.split(self.widths), self.hidden.split(self.widths), strict=True):
            limit = hidden.norm() * self.edit.settings.clamp
            delta.mul_((limit / delta.norm().clamp_min(1e-12)).clamp(max=1))

    def stop(self, error: EditingError) -> None:
        self.error = error
        self.delta.grad = None  # the optimiser passes it over


def searches_of(edit: ConceptEdit, pipeline: EditablePipeline, *, index: int) -> list[Search]:
    """The searches of one edit, the call's `index`-th. Raises `InvalidEdit` where a prompt cannot be placed."""
    for encoder in pipeline.encoders:
        validate_edit(edit, encoder.tokenizer)
    layers = _layers(edit, pipeline)
    positions = tuple(
        tuple(encoder.tokenizer.locate(template, edit.source) for template in edit.templates)
        for encoder in pipeline.encoders
    )
    widths = tuple(encoder.width for encoder in pipeline.encoders)
    by_template = [destination_prompts(edit.destination, template) for template in edit.templates]
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
            delta=nn.Parameter(torch.zeros(sum(widths), device=pipeline.device)),
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
    """The source prompts of the searches that share a step, with their states after layer L of each encoder."""

    def __init__(self, pipeline: EditablePipeline, searches: Sequence[Search]) -> None:
        device = pipeline.device
        counts = [len(search.edit.templates) for search in searches]
        settings = [search.edit.settings for search in searches]
        full_length = any(search.edit.objective != "text" for search in searches)  # the U-Net reads the padding too

        self.first = torch.tensor([0, *counts[:-1]], device=device).cumsum(0)  # (e,): each search's first prompt
        self._row = torch.arange(len(searches), device=device).repeat_interleave(torch.tensor(counts, device=device))
        self._share = 1 / torch.tensor(counts, device=device)[self._row]  # (p,)
        self._sources = [
            _SourcePrompts(
                encoder,
                [position for search in searches for position in search.positions[i]],
                layer=searches[0].layers[i],
                full_length=full_length,
            )
            for i, encoder in enumerate(pipeline.encoders)
        ]
        self.hidden = torch.cat([self._mean(sources.at_subject()) for sources in self._sources], dim=1)
        """h (e, D) float32, the mean over the templates."""

        self.text_weights = torch.tensor([search.text_weight for search in searches], device=device)  # (e,)
        self._decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
        destinations = [destination for search in searches if search.uses_text for destination in search.destinations]
        self._compared = self.text_weights[self._row] > 0  # (p,)
        self._targets = [sources.said_of(destinations) for sources in self._sources] if destinations else []

    def encode(self, deltas: Tensor) -> list[Encoding]:
        """What each encoder makes of the prompts with δ (e, D) in place."""
        parts = deltas[self._row].split(self._widths, dim=1)
        return [sources.encode(shift) for sources, shift in zip(self._sources, parts, strict=True)]

    def text_losses(self, encodings: Sequence[Encoding]) -> Tensor:
        """L_txt (e,), Eq. 2: the mean square at EOS, summed over the encoders; 0 where a search has no text loss."""
        errors = torch.zeros(len(self._row), device=self._row.device)  # (p,)
        if self._targets:
            parts = [
                (encoding.said[self._compared].float() - target).square().mean(1)
                for encoding, target in zip(encodings, self._targets, strict=True)
            ]
            errors = errors.index_put((self._compared,), torch.stack(parts).sum(0))
        return self._mean(errors)

    def regulariser(self, deltas: Tensor) -> Tensor:
        """weight_decay · ‖δ‖²/‖h‖² (e,), summed over the encoders."""
        ratios = [
            delta.square().sum(1) / hidden.square().sum(1)
            for delta, hidden in zip(deltas.split(self._widths, 1), self.hidden.split(self._widths, 1), strict=True)
        ]
        return self._decay * torch.stack(ratios).sum(0)

    @property
    def _widths(self) -> list[int]:
        return [sources.encoder.width for sources in self._sources]

    def _mean(self, rows: Tensor) -> Tensor:
        """(p, ·) to the mean over each search's templates, (e, ·)."""
        share = self._share.view(-1, *[1] * (rows.ndim - 1))
        return rows.new_zeros(len(self.first), *rows.shape[1:]).index_add(0, self._row, rows * share)


class _SourcePrompts:
    """One encoder's states of the source prompts after its layer L, which no step changes."""

    def __init__(
        self, encoder: EditableEncoder, positions: Sequence[SubjectPosition], *, layer: int, full_length: bool
    ) -> None:
        self.encoder = encoder
        self._layer = layer
        self._prompt = torch.arange(len(positions), device=encoder.device)
        self._subject = torch.tensor([position.last_subject_index for position in positions], device=encoder.device)
        self._eos = torch.tensor([position.eos_index for position in positions], device=encoder.device)
        with torch.no_grad():
            ids = encoder.ids([position.ids for position in positions], full_length=full_length)
            self._states = encoder.advance(encoder.embed(ids), start=0, stop=layer + 1)  # (p, s, d)

    def at_subject(self) -> Tensor:
        """(p, d) float32"""
        return self._states[self._prompt, self._subject].float()

    def encode(self, shift: Tensor) -> Encoding:
        """With the shifts (p, d) added at the last subject tokens."""
        at = (self._prompt, self._subject)
        states = self._states.index_put(at, shift.to(self._states.dtype), accumulate=True)
        return self.encoder.read(states, start=self._layer + 1, ends=self._eos)

    @torch.no_grad()
    def said_of(self, destinations: Sequence[str]) -> Tensor:
        """What is said of each destination, float32."""
        ids = [self.encoder.tokenizer.encode(destination).ids for destination in destinations]
        return self.encoder.encoding(ids, full_length=False).said.float()
