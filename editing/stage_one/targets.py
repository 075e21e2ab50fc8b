"""The text loss of stage I: what an encoder gives for source prompts with δ, against destination prompts.

Of CLIP it compares the pooled output, E_eos of Eq. 2. Other encoders have none, and it compares what the generator
reads: every tap at every position from the last subject token on, aligned with the destination's last token.

Shapes: p prompts, s positions, t aligned positions, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.encoders.base import Encoding, TextEncoder
from editing.prompts import SubjectPosition, TokenizedPrompt


@dataclass(frozen=True)
class Compared:
    """A destination prompt that a source prompt is compared with."""

    prompt: TokenizedPrompt
    last_index: int
    """The position that the source's last subject token is aligned with."""


@dataclass(frozen=True)
class Targets:
    """What p source prompts are compared with. A prompt without a text loss has no present position."""

    taps: tuple[Tensor, ...]
    """(p, t, d) each, float32. The pooled output is one tap at one position."""
    present: Tensor
    """(p, t) bool: the positions that count"""
    scales: tuple[Tensor, ...]
    """(p,) of each tap: the inverse of its variance; 1 for the pooled output"""
    is_pooled: bool

    @classmethod
    @torch.no_grad()
    def encode(
        cls, encoder: TextEncoder, sources: Sequence[SubjectPosition], compared: Sequence[Compared | None]
    ) -> "Targets":
        """Encode the prompts that the source prompts are compared with, each None without a text loss."""
        device, is_pooled = encoder.device, encoder.has_pooled_objective
        pairs = [(row, *pair) for row, pair in enumerate(zip(sources, compared, strict=True)) if pair[1] is not None]
        rows = torch.tensor([row for row, _, _ in pairs], dtype=torch.long, device=device)
        counts = torch.zeros(len(sources), dtype=torch.long, device=device)  # (p,): the aligned positions of each
        read: list[Tensor] = []  # (rows, s, d) each
        starts = torch.zeros_like(rows)
        if pairs:
            # No token sees the padding after it, unless it is at full length anyway: the shortest length is enough.
            encoding = encoder.encode([each.prompt.ids for _, _, each in pairs if each], full_length=False)
            read = _read(encoding, is_pooled=is_pooled)
            counts[rows] = 1
            if not is_pooled:
                starts = torch.tensor([each.last_index for _, _, each in pairs if each], device=device)
                aligned = [_count_aligned(encoder, source, each) for _, source, each in pairs if each]
                counts[rows] = torch.tensor(aligned, device=device)
        present = torch.arange(int(counts.max()), device=device) < counts[:, None]  # (p, t)
        taps, scales = [], []
        for number, width in enumerate(encoder.objective_widths):
            target = torch.zeros(*present.shape, width, device=device)
            scale = torch.ones(len(sources), device=device)
            if read:
                own = _gather(read[number], starts, present.shape[1])  # (rows, t, d)
                target[rows] = own
                if not is_pooled:
                    variances = [states[kept].var() for states, kept in zip(own, present[rows], strict=True)]
                    scale[rows] = 1 / torch.stack(variances).clamp_min(1e-12)
            taps.append(target)
            scales.append(scale)
        return cls(tuple(taps), present, tuple(scales), is_pooled)

    @classmethod
    def join(cls, parts: Sequence["Targets"]) -> "Targets":
        """Join the targets of prompts, in order."""
        lacking = [max(other.present.shape[1] for other in parts) - part.present.shape[1] for part in parts]
        widened = [
            [F.pad(tap, (0, 0, 0, count)) for tap in part.taps] for part, count in zip(parts, lacking, strict=True)
        ]
        return cls(
            tuple(torch.cat(tap) for tap in zip(*widened, strict=True)),
            torch.cat([F.pad(part.present, (0, count)) for part, count in zip(parts, lacking, strict=True)]),
            tuple(torch.cat(scale) for scale in zip(*(part.scales for part in parts), strict=True)),
            parts[0].is_pooled,
        )

    def select(self, prompts: slice | Tensor) -> "Targets":
        """Return the targets of some prompts."""
        taps, scales = (tuple(tensor[prompts] for tensor in own) for own in (self.taps, self.scales))
        return Targets(taps, self.present[prompts], scales, self.is_pooled)

    def compute_errors(self, encoding: Encoding, *, subject: Tensor) -> Tensor:
        """Return the error (p,) of each prompt: the mean square over positions and width, averaged over the taps.

        `subject` (p,) are the positions of the last subject tokens. Without a text loss, the error is 0.
        """
        read = _read(encoding, is_pooled=self.is_pooled)
        starts = torch.zeros_like(subject) if self.is_pooled else subject
        length, counts = self.present.shape[1], self.present.sum(1).clamp_min(1)
        errors = []
        for tap, target, scale in zip(read, self.taps, self.scales, strict=True):
            squares = (_gather(tap, starts, length) - target).square().mean(2)  # (p, t)
            errors.append((squares * self.present).sum(1) / counts * scale)
        return torch.stack(errors).mean(0)


def _read(encoding: Encoding, *, is_pooled: bool) -> list[Tensor]:
    """Return what is compared, (p, s, d) float32 each: the taps, or the pooled output as one tap at one position."""
    if is_pooled:
        assert encoding.pooled is not None
        return [encoding.pooled.float()[:, None]]
    return [tap.float() for tap in encoding.taps]


def _count_aligned(encoder: TextEncoder, source: SubjectPosition, compared: Compared) -> int:
    """Return the number of positions from the last subject token on that both prompts have and the generator reads."""
    if encoder.reads_padding:
        return encoder.tokenizer.max_length - max(source.last_subject_index, compared.last_index)
    return min(len(source.ids) - source.last_subject_index, len(compared.prompt.ids) - compared.last_index)


def _gather(states: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return `length` states of each prompt from its start on, (p, s, d) to (p, length, d); past the end, the last."""
    index = (starts[:, None] + torch.arange(length, device=states.device)).clamp_max(states.shape[1] - 1)  # (p, length)
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))
