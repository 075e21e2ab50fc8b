"""Second moments of the keys, E[k kᵀ] per layer, and the file that holds them."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from editing.errors import EditingError, InvalidEdit
from editing.families.layout import SECOND_MOMENTS, EncoderDescription

FIRST = "text_encoder"


@dataclass(frozen=True)
class SecondMoments:
    """E[k kᵀ] per layer of an encoder, (m, m) float64, over every token of the captions with BOS and EOS, no padding.

    The values are those of the file's float32, so that a set just estimated and the same set read back are equal.
    """

    moments: Mapping[int, Tensor]
    captions: int
    tokens: int
    encoder: str = "text_encoder"
    others: tuple["SecondMoments", ...] = ()
    """Those of the pipeline's other encoders."""

    @property
    def parts(self) -> tuple["SecondMoments", ...]:
        """One for each encoder, this one first."""
        return self, *self.others

    @classmethod
    def join(cls, parts: Sequence["SecondMoments"]) -> "SecondMoments":
        """One set of the encoders of a pipeline, which one file can hold."""
        first, *others = parts
        return replace(first, others=tuple(others))

    def of(self, encoder: str) -> "SecondMoments":
        """The part of one encoder."""
        for part in self.parts:
            if part.encoder == encoder:
                return replace(part, others=())
        raise InvalidEdit(f"the second moments do not cover {encoder}: estimate them for it, and join the sets")

    def require_encoders(self, encoders: Iterable[EncoderDescription], *, pointer: str) -> None:
        """Raise `InvalidEdit` at `pointer` unless these are moments of the text encoders."""
        for encoder in encoders:
            for layer, moment in self.of(encoder.name).moments.items():
                if not 0 <= layer < encoder.layers or moment.shape[0] != encoder.mlp_width:
                    raise InvalidEdit(
                        f"{SECOND_MOMENTS} is of another text encoder: it has a layer {layer} of width "
                        f"{moment.shape[0]}, and {encoder.name} has {encoder.layers} layers of {encoder.mlp_width}",
                        pointer=pointer,
                    )

    @cached_property
    def digest(self) -> str:
        """sha256 of the file that `to_bytes` gives."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The safetensors file: `layer_{i}`, the upper triangle row by row, (m(m+1)/2,) float32, and one JSON metadata
        string. Equal sets give equal bytes.

        Where there is more than the first encoder, the keys say which: `{encoder}.layer_{i}`.
        """
        plain = not self.others and self.encoder == FIRST
        tensors = {
            f"{'' if plain else f'{part.encoder}.'}layer_{layer}": packed(moment).float().cpu()
            for part in self.parts
            for layer, moment in sorted(part.moments.items())
        }
        counts = {part.encoder: {"captions": part.captions, "tokens": part.tokens} for part in self.parts}
        metadata = counts[FIRST] if plain else counts
        return save(tensors, metadata={"second_moments": json.dumps(metadata, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[int] | None = None) -> "SecondMoments":
        """Read a file of `save`, or one that holds each moment as a whole matrix (m, m); or only these layers."""
        try:
            with safe_open(path, framework="pt") as file:
                counts = json.loads((file.metadata() or {}).get("second_moments", "{}"))
                moments: dict[str, dict[int, Tensor]] = {}
                for key in file.keys():
                    encoder, _, name = key.rpartition(".")
                    layer = int(name.removeprefix("layer_"))
                    if layers is None or layer in layers:
                        moments.setdefault(encoder or FIRST, {})[layer] = _symmetric(file.get_tensor(key))
        except Exception as error:  # safetensors raises its own, for a cut or foreign file
            raise EditingError(f"{Path(path).name} holds no second moments: {error}") from error
        parts = []
        for encoder, part in sorted(moments.items()):
            own = counts.get(encoder, counts)
            captions, tokens = own.get("captions", 0), own.get("tokens", 0)
            parts.append(cls(dict(sorted(part.items())), captions=captions, tokens=tokens, encoder=encoder))
        return cls.join(parts or [cls({}, captions=0, tokens=0)])


def mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle this is."""
    return matrix.triu() + matrix.triu(1).T


def packed(matrix: Tensor) -> Tensor:
    """The upper triangle of (m, m) row by row, (m(m+1)/2,)."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu()]


def unpacked(packed: Tensor) -> Tensor:
    """The symmetric matrix (m, m) of which `packed` made this. Raises ValueError for another length."""
    m = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    if m * (m + 1) // 2 != len(packed):
        raise ValueError(f"{len(packed)} numbers are no triangle")
    matrix = packed.new_zeros(m, m)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu()] = packed
    return mirrored(matrix)


def _symmetric(stored: Tensor) -> Tensor:
    """A moment of a file, packed or a whole matrix, as (m, m) float64. Raises ValueError for what is neither."""
    if stored.ndim == 1:
        return unpacked(stored).double()
    if stored.ndim != 2 or stored.shape[0] != stored.shape[1]:
        raise ValueError("a moment must be square")
    if not torch.allclose(stored, stored.T, rtol=1e-3, atol=float(stored.abs().max()) * 1e-5):
        raise ValueError("a moment must be symmetric")
    return mirrored(stored).double()
