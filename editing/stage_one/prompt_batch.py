"""The source prompts of a batch of optimizations, and the losses that need no U-Net.

The states up to layer L do not depend on δ and are computed once. A step runs only the layers after L.

Shapes: e optimizations, p prompts (all templates of all optimizations), s positions, d width of an encoder, D the sum
of the encoders' widths.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.encoders.base import Context, Encoding, SharedPrefix, TextEncoder
from editing.pipelines import EditablePipeline
from editing.stage_one.optimization import Optimization
from editing.stage_one.targets import Targets


class PromptBatch:
    """The source prompts of the optimizations that share a step.

    `split` gives each optimization a batch of its own, and `join` puts those together that run together, so that the
    states are computed once for each optimization.
    """

    _PER_OPTIMIZATION = ("hidden", "text_weights", "_weight_decay", "_max_norms")

    def __init__(
        self, pipeline: EditablePipeline, optimizations: Sequence[Optimization], *, full_length: bool | None = None
    ) -> None:
        """`full_length` includes the padding that the generator reads. Default: if any optimization needs it."""
        device = pipeline.device
        settings = [optimization.edit.settings for optimization in optimizations]
        if full_length is None:
            full_length = any(optimization.edit.objective != "text" for optimization in optimizations)
        self._index_prompts([len(optimization.edit.templates) for optimization in optimizations], device=device)
        self._sources = [
            _SourcePrompts.encode_sources(encoder, optimizations, number=number, full_length=full_length)
            for number, encoder in enumerate(pipeline.encoders)
        ]
        self._widths = optimizations[0].widths
        self.hidden = torch.cat([self._average(sources.subject_states()) for sources in self._sources], dim=1)
        """h (e, D) float32, the mean over the templates."""

        self.text_weights = torch.tensor([each.text_weight for each in optimizations], device=device)  # (e,)
        self._weight_decay = torch.tensor([each.weight_decay for each in settings], device=device)  # (e,)
        lengths = torch.stack([hidden.norm(dim=1) for hidden in self.hidden.split(self._widths, 1)], 1)
        factors = torch.tensor([each.max_delta_norm for each in settings], device=device)
        self._max_norms = lengths * factors[:, None]  # (e, encoders): the bound of ‖δ‖

    def split(self) -> list["PromptBatch"]:
        """Return a batch for each optimization."""
        batches = []
        for row, (first, count) in enumerate(zip(self.first.tolist(), self._counts, strict=True)):
            own = copy.copy(self)
            own._index_prompts([count], device=self.first.device)
            own._sources = [sources.select(slice(first, first + count)) for sources in self._sources]
            for name in self._PER_OPTIMIZATION:
                setattr(own, name, getattr(self, name)[row : row + 1])
            batches.append(own)
        return batches

    @classmethod
    def join(cls, batches: Sequence["PromptBatch"]) -> "PromptBatch":
        """Join batches of the same layers, in order."""
        whole = copy.copy(batches[0])
        whole._index_prompts([count for batch in batches for count in batch._counts], device=whole.first.device)
        whole._sources = [
            _SourcePrompts.join(sources) for sources in zip(*(batch._sources for batch in batches), strict=True)
        ]
        for name in cls._PER_OPTIMIZATION:
            setattr(whole, name, torch.cat([getattr(batch, name) for batch in batches]))
        return whole

    def _index_prompts(self, counts: list[int], *, device: torch.device) -> None:
        """Note which optimization each prompt belongs to, from the number of prompts of each."""
        self._counts = counts
        number = torch.tensor(counts, device=device)  # (e,)
        self.first = torch.tensor([0, *counts[:-1]], device=device).cumsum(0)  # (e,): the first prompt of each
        self._row = torch.arange(len(counts), device=device).repeat_interleave(number)  # (p,)
        self._share = 1 / number[self._row]  # (p,)

    @property
    def uses_text(self) -> bool:
        """Whether any optimization has a text loss."""
        return bool((self.text_weights > 0).any())

    def encode(self, deltas: Tensor, prompts: Tensor | None = None) -> list[Encoding]:
        """Return each encoder's output for the prompts with δ (e, D) added: E_{v=+δ}(p) of Eq. 2.

        `prompts` are the indices of those to encode, by default all.
        """
        row, sources = self._row, self._sources
        if prompts is not None:
            row, sources = row[prompts], [own.select(prompts) for own in sources]
        shifts = deltas[row].split(self._widths, dim=1)  # (p, d) for each encoder: one δ for all templates
        return [own.encode(shift) for own, shift in zip(sources, shifts, strict=True)]

    def text_losses(self, encodings: Sequence[Encoding]) -> Tensor:
        """Return L_txt (e,), summed over the encoders and averaged over the templates; 0 without a text loss."""
        errors = [
            sources.targets.compute_errors(encoding, subject=sources.subject)  # (p,)
            for encoding, sources in zip(encodings, self._sources, strict=True)
        ]
        losses = self._average(torch.stack(errors).sum(0))  # (e,)
        return torch.where(self.text_weights > 0, losses, torch.zeros_like(losses))

    def regularizer(self, deltas: Tensor) -> Tensor:
        """Return weight_decay · ‖δ‖²/‖h‖² (e,), summed over the encoders."""
        ratios = [
            delta.square().sum(1) / hidden.square().sum(1)
            for delta, hidden in zip(deltas.split(self._widths, 1), self.hidden.split(self._widths, 1), strict=True)
        ]
        return self._weight_decay * torch.stack(ratios).sum(0)

    def limit_norm(self, deltas: Tensor) -> Tensor:
        """Shorten δ (e, D) in each encoder to at most `max_delta_norm` times ‖h‖."""
        limited = [
            delta * (limit / delta.norm(dim=1).clamp_min(1e-12)).clamp(max=1)[:, None]
            for delta, limit in zip(deltas.split(self._widths, 1), self._max_norms.unbind(1), strict=True)
        ]
        return torch.cat(limited, 1)

    def _average(self, rows: Tensor) -> Tensor:
        """Average rows (p, ·) over the templates of each optimization, (e, ·)."""
        share = self._share.view(-1, *[1] * (rows.ndim - 1))
        return rows.new_zeros(len(self.first), *rows.shape[1:]).index_add(0, self._row, rows * share)


@dataclass(frozen=True)
class _SourcePrompts:
    """The source prompts in one encoder."""

    encoder: TextEncoder
    layer: int
    """L"""
    states: Tensor
    """(p, s, d) after layer L, without δ, at the tokens after the shared prefix"""
    mask: Tensor
    """(p, s) bool: tokens, not padding"""
    prefix: SharedPrefix | None
    subject: Tensor
    """(p,): the last subject tokens, counted from the start of the prompts"""
    ends: Tensor
    """(p,): the last tokens"""
    targets: Targets
    """What the text loss compares the prompts with."""

    @classmethod
    @torch.no_grad()
    def encode_sources(
        cls, encoder: TextEncoder, optimizations: Sequence[Optimization], *, number: int, full_length: bool
    ) -> "_SourcePrompts":
        """Encode the prompts of the optimizations with the pipeline's encoder of this number."""
        positions = [position for optimization in optimizations for position in optimization.positions[number]]
        layer = optimizations[0].layers[number]
        padded = encoder.pad([position.ids for position in positions], full_length=full_length)
        states = encoder.embed(padded.ids)
        contexts = encoder.build_contexts(states, mask=padded.mask)
        subject = torch.tensor([position.last_subject_index for position in positions], device=encoder.device)
        states = encoder.run_layers(states, start=0, stop=layer + 1, contexts=contexts)
        prefix = encoder.run_prefix(states, start=layer + 1)
        skipped = prefix.length if prefix else 0
        return cls(
            encoder,
            layer,
            states=states[:, skipped:],
            mask=padded.mask[:, skipped:],
            prefix=prefix,
            subject=padded.starts + subject,
            ends=padded.ends,
            targets=Targets.encode(
                encoder, positions, [compared for each in optimizations for compared in each.compare(number)]
            ),
        )

    @classmethod
    def join(cls, parts: Sequence["_SourcePrompts"]) -> "_SourcePrompts":
        """Join prompts. Shorter ones are padded with zeros, which no token sees: attention is causal or masked."""
        longest = max(part.states.shape[1] for part in parts)
        lacking = [longest - part.states.shape[1] for part in parts]
        return replace(
            parts[0],
            states=torch.cat([F.pad(part.states, (0, 0, 0, n)) for part, n in zip(parts, lacking, strict=True)]),
            mask=torch.cat([F.pad(part.mask, (0, n)) for part, n in zip(parts, lacking, strict=True)]),
            subject=torch.cat([part.subject for part in parts]),
            ends=torch.cat([part.ends for part in parts]),
            targets=Targets.join([part.targets for part in parts]),
        )

    def select(self, prompts: slice | Tensor) -> "_SourcePrompts":
        return replace(
            self,
            states=self.states[prompts],
            mask=self.mask[prompts],
            subject=self.subject[prompts],
            ends=self.ends[prompts],
            targets=self.targets.select(prompts),
        )

    @cached_property
    def _contexts(self) -> Sequence[Context]:
        return self.encoder.build_contexts(self.states, mask=self.mask, prefix=self.prefix)

    @property
    def _subject_index(self) -> tuple[Tensor, Tensor]:
        """Index of the states at the last subject tokens."""
        skipped = self.prefix.length if self.prefix else 0
        return torch.arange(len(self.subject), device=self.subject.device), self.subject - skipped

    def subject_states(self) -> Tensor:
        """Return the states after layer L at the last subject tokens, (p, d) float32."""
        return self.states[self._subject_index].float()

    def encode(self, shift: Tensor) -> Encoding:
        """Add the shifts (p, d) at the last subject tokens and run the layers after L."""
        states = self.states.index_put(self._subject_index, shift.to(self.states.dtype), accumulate=True)
        encoding = self.encoder.encode_from(
            states, start=self.layer + 1, mask=self.mask, ends=self.ends, contexts=self._contexts
        )
        return self.prefix.prepend_to(encoding) if self.prefix else encoding
