"""Second moments E[k kᵀ] of the keys, and their file.

Shapes: m MLP width, the width of the keys.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from editing.errors import EditingError, InvalidEdit
from editing.families.layout import SECOND_MOMENTS, EncoderDescription

FIRST_ENCODER = "text_encoder"


@dataclass(frozen=True)
class SecondMoments:
    """E[k kᵀ] of an encoder's layers, (m, m) float64, over all tokens of the captions: with BOS and EOS, no padding.

    The entries are float32 numbers, as in the file, so that estimated and loaded moments are equal.
    """

    moments: Mapping[int, Tensor]
    """By layer."""
    captions: int
    tokens: int
    truncated: int = 0
    """The number of captions that the tokenizer truncated."""
    encoder: str = FIRST_ENCODER
    other_encoders: tuple["SecondMoments", ...] = ()
    """Moments of the pipeline's other encoders."""
    prefix_shares: Mapping[int, float] = field(default_factory=dict)
    """By layer, the share of the trace that the first tokens of all prompts have, where a family puts text there.

    Language models have an attention sink: the key of their first token is longer than all others together.
    """

    @property
    def per_encoder(self) -> tuple["SecondMoments", ...]:
        """The moments of each encoder, this one first."""
        return self, *self.other_encoders

    @classmethod
    def join(cls, encoders: Sequence["SecondMoments"]) -> "SecondMoments":
        """Join the moments of a pipeline's encoders, for one file."""
        first, *others = encoders
        return replace(first, other_encoders=tuple(others))

    def select(self, encoder: str) -> "SecondMoments":
        """Return the moments of one encoder. Raises `InvalidEdit`."""
        for own in self.per_encoder:
            if own.encoder == encoder:
                return replace(own, other_encoders=())
        raise InvalidEdit(f"there are no second moments of {encoder}: estimate them, and join both")

    def require_encoders(self, encoders: Iterable[EncoderDescription], *, pointer: str) -> None:
        """Raise `InvalidEdit` at `pointer` unless these are moments of the text encoders."""
        for encoder in encoders:
            for layer, moment in self.select(encoder.name).moments.items():
                if not 0 <= layer < encoder.layers or moment.shape[0] != encoder.mlp_width:
                    raise InvalidEdit(
                        f"{SECOND_MOMENTS} is of another text encoder: it has a layer {layer} of width "
                        f"{moment.shape[0]}, and {encoder.name} has {encoder.layers} layers of {encoder.mlp_width}",
                        pointer=pointer,
                    )

    @cached_property
    def digest(self) -> str:
        """The sha256 of `to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Write a safetensors file: `layer_{i}`, the upper triangle row by row, (m(m+1)/2,) float32.

        Keys are `{encoder}.layer_{i}` if there are other encoders than the first. The metadata is one JSON string.
        Equal moments give equal bytes.
        """
        plain = not self.other_encoders and self.encoder == FIRST_ENCODER
        tensors = {
            f"{'' if plain else f'{own.encoder}.'}layer_{layer}": pack_triangle(moment).float().cpu()
            for own in self.per_encoder
            for layer, moment in sorted(own.moments.items())
        }
        counts = {own.encoder: own._count() for own in self.per_encoder}
        metadata = counts[FIRST_ENCODER] if plain else counts
        return save(tensors, metadata={"second_moments": json.dumps(metadata, sort_keys=True)})

    def _count(self) -> dict[str, Any]:
        counts: dict[str, Any] = {"captions": self.captions, "tokens": self.tokens}
        if self.truncated:
            counts["truncated"] = self.truncated
        if self.prefix_shares:
            counts["prefix_shares"] = {str(layer): share for layer, share in sorted(self.prefix_shares.items())}
        return counts

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[int] | None = None) -> "SecondMoments":
        """Read a file of `save`, or one with whole matrices (m, m). Raises `EditingError`.

        With `layers`, only these are read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                counts = json.loads((file.metadata() or {}).get("second_moments", "{}"))
                moments: dict[str, dict[int, Tensor]] = {}
                for key in file.keys():
                    encoder, _, name = key.rpartition(".")
                    layer = int(name.removeprefix("layer_"))
                    if layers is None or layer in layers:
                        moments.setdefault(encoder or FIRST_ENCODER, {})[layer] = _read_moment(file.get_tensor(key))
        except Exception as error:  # safetensors has errors of its own
            raise EditingError(f"{Path(path).name} has no second moments that can be read: {error}") from error
        parts = []
        for encoder, part in sorted(moments.items()):
            own = counts.get(encoder, counts)
            shares = {int(layer): share for layer, share in own.get("prefix_shares", {}).items()}
            parts.append(
                cls(
                    dict(sorted(part.items())),
                    captions=own.get("captions", 0),
                    tokens=own.get("tokens", 0),
                    truncated=own.get("truncated", 0),
                    encoder=encoder,
                    prefix_shares=shares,
                )
            )
        return cls.join(parts or [cls({}, captions=0, tokens=0)])


def mirror_triangle(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix with this upper triangle, (m, m) to (m, m)."""
    return matrix.triu() + matrix.triu(1).T


def pack_triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of (m, m) row by row, (m(m+1)/2,)."""
    return torch.cat([row[number:] for number, row in enumerate(matrix)])


def unpack_triangle(packed: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the symmetric matrix (m, m) of a packed triangle. Raises ValueError for another length.

    Memory holds nothing else of its size.
    """
    # m(m+1)/2 = length, solved for m
    m = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    if m * (m + 1) // 2 != len(packed):
        raise ValueError(f"{len(packed)} numbers are no triangle of a square matrix")
    matrix = packed.new_empty(m, m, dtype=dtype or packed.dtype)
    for number, row in enumerate(packed.split(list(range(m, 0, -1)))):
        matrix[number, number:] = matrix[number:, number] = row
    return matrix


def _read_moment(stored: Tensor) -> Tensor:
    """Return a moment (m, m) float64 from a packed triangle or a whole matrix. Raises ValueError."""
    if stored.ndim == 1:
        return unpack_triangle(stored, dtype=torch.float64)
    if stored.ndim != 2 or stored.shape[0] != stored.shape[1]:
        raise ValueError("a moment must be square")
    if not torch.allclose(stored, stored.T, rtol=1e-3, atol=float(stored.abs().max()) * 1e-5):
        raise ValueError("a moment must be symmetric")
    return mirror_triangle(stored).double()
