"""How each family makes a generator's condition of what its text encoders give.

Shapes: p prompts, s positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.condition import Condition
from editing.encoders.base import Encoding, TextEncoder
from editing.families.qwen_image import QWEN_IMAGE
from editing.families.sana import TOKENS


def encode_prompts(encoders: Sequence[TextEncoder], prompts: Sequence[str], *, negative: bool = False) -> Condition:
    """Return the condition that the pipeline's `encode_prompt` makes of prompts, or of negative prompts."""
    encodings = [encoder.encode_texts(prompts, negative=negative) for encoder in encoders]
    return join_encodings(encoders[0].family, encodings)


@dataclass(frozen=True)
class Origins:
    """The token that each position of a condition shows. On the CPU."""

    encoder: Tensor
    """(p, s): the number of its encoder; -1 where the generator reads nothing."""
    position: Tensor
    """(p, s): its position, counted from the prompt's first token. Padding is before 0 or after the last token."""


def encode_with_origins(encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> tuple[Condition, Origins]:
    """Return the condition of prompts, and the token that each of its positions shows.

    The tokens' numbers go through the family's own join in place of the states. Of encoders that stand side by side,
    the first counts.
    """
    family, encodings = encoders[0].family, [encoder.encode_texts(prompts) for encoder in encoders]
    condition = join_encodings(family, encodings)
    numbers = [_number_tokens(encoding, start=1 + n * _SPAN) for n, encoding in enumerate(encodings)]
    shown = join_encodings(family, numbers).states[..., 0].long() - 1  # (p, s); -1 for padding with zeros
    if condition.mask is not None:
        shown = torch.where(condition.mask, shown, -1)
    encoder = shown.div(_SPAN, rounding_mode="floor")  # (p, s)
    first = torch.stack([encoding.mask.int().argmax(1) for encoding in encodings])  # (encoders, p)
    starts = first.T.gather(1, encoder.clamp_min(0))  # (p, s)
    return condition, Origins(encoder.cpu(), (shown % _SPAN - starts).cpu())


_SPAN = 1 << 16  # more than an encoder has positions


def _number_tokens(encoding: Encoding, *, start: int) -> Encoding:
    """Replace the states by the numbers of their positions, from `start`."""
    numbers = torch.arange(encoding.mask.shape[1], dtype=torch.float64, device=encoding.mask.device) + start
    return replace(encoding, taps=tuple(numbers[:, None].expand_as(tap) for tap in encoding.taps))


def join_encodings(family: str, encodings: Sequence[Encoding]) -> Condition:
    """Join the outputs of a pipeline's encoders, in its order, for the same prompts."""
    return _JOIN[family](encodings)


def _read_one(encodings: Sequence[Encoding]) -> Condition:
    (encoding,) = encodings
    return Condition(encoding.states)


def _read_masked(encodings: Sequence[Encoding]) -> Condition:
    (encoding,) = encodings
    return Condition(encoding.states, encoding.mask)


def _join_sdxl(encodings: Sequence[Encoding]) -> Condition:
    """Join both encoders side by side, and the pooled output of the second."""
    states = torch.cat([encoding.states for encoding in encodings], dim=-1)
    return Condition(states, pooled=encodings[-1].pooled)


def _join_sd3(encodings: Sequence[Encoding]) -> Condition:
    """Join both CLIPs side by side, widened with zeros, then T5 after them in the sequence."""
    *clips, t5 = encodings
    states = torch.cat([clip.states for clip in clips], dim=-1)
    states = F.pad(states, (0, t5.states.shape[-1] - states.shape[-1]))
    pooled = [clip.pooled for clip in clips if clip.pooled is not None]
    return Condition(torch.cat([states, t5.states], dim=1), pooled=torch.cat(pooled, dim=-1))


def _join_flux(encodings: Sequence[Encoding]) -> Condition:
    clip, t5 = encodings
    return Condition(t5.states, pooled=clip.pooled)


def _read_chroma(encodings: Sequence[Encoding]) -> Condition:
    """Read all tokens and the first one of the padding."""
    (encoding,) = encodings
    mask = encoding.mask
    return Condition(encoding.states, torch.arange(mask.shape[1], device=mask.device) <= mask.sum(1, keepdim=True))


def _read_auraflow(encodings: Sequence[Encoding]) -> Condition:
    (encoding,) = encodings
    return Condition(encoding.states * encoding.mask.unsqueeze(-1))


def _read_z_image(encodings: Sequence[Encoding]) -> Condition:
    """Read the tokens alone, padded with zeros to the longest prompt."""
    (encoding,) = encodings
    return _pack(encoding.states, encoding.mask, dropped=0)


def _read_qwen_image(encodings: Sequence[Encoding]) -> Condition:
    """Read the tokens after the instruction, padded with zeros to the longest prompt."""
    (encoding,) = encodings
    condition = _pack(encoding.states, encoding.mask, dropped=QWEN_IMAGE.dropped_tokens)
    return Condition(condition.states) if condition.mask is not None and condition.mask.all() else condition


def _read_sana(encodings: Sequence[Encoding]) -> Condition:
    """Read the first token and the last ones."""
    (encoding,) = encodings
    states, mask = encoding.states, encoding.mask
    if states.shape[1] > TOKENS:
        states, mask = (torch.cat([read[:, :1], read[:, 1 - TOKENS :]], dim=1) for read in (states, mask))
    return Condition(states, mask)


def _pack(states: Tensor, mask: Tensor, *, dropped: int) -> Condition:
    """Move each prompt's tokens after the first `dropped` to the left, and fill with zeros."""
    lengths = mask.sum(1) - dropped  # (p,)
    position = torch.arange(int(lengths.max()), device=mask.device)
    kept = position < lengths[:, None]  # (p, longest)
    # The tokens of a prompt are consecutive: from its first one on, or from the first that is not dropped.
    index = (mask.int().argmax(1, keepdim=True) + dropped + position).clamp_max(mask.shape[1] - 1)
    packed = states.gather(1, index[..., None].expand(-1, -1, states.shape[2])) * kept[..., None]
    return Condition(packed, kept)


_JOIN: dict[str, Callable[[Sequence[Encoding]], Condition]] = {
    "sd1": _read_one,
    "sd2": _read_one,
    "sdxl": _join_sdxl,
    "sd3": _join_sd3,
    "flux": _join_flux,
    "chroma": _read_chroma,
    "pixart_alpha": _read_masked,
    "pixart_sigma": _read_masked,
    "auraflow": _read_auraflow,
    "z_image": _read_z_image,
    "flux2_klein": _read_one,
    "qwen_image": _read_qwen_image,
    "lumina2": _read_masked,
    "sana": _read_sana,
}
