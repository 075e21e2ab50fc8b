"""Second moments of the keys, E[k kᵀ] per layer: what the text encoder's memories are asked for in everyday use."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from editing.encoders import EditableEncoder
from editing.errors import EditingError, InvalidEdit, SingularSecondMoment

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

    @cached_property
    def digest(self) -> str:
        """sha256 of the file that `to_bytes` gives."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The safetensors file: `layer_{i}` in float32 and one JSON metadata string. Equal sets give equal bytes.

        Where there is more than the first encoder, the keys say which: `{encoder}.layer_{i}`.
        """
        plain = not self.others and self.encoder == FIRST
        tensors = {
            f"{'' if plain else f'{part.encoder}.'}layer_{layer}": moment.float().cpu().contiguous()
            for part in self.parts
            for layer, moment in sorted(part.moments.items())
        }
        counts = {part.encoder: {"captions": part.captions, "tokens": part.tokens} for part in self.parts}
        metadata = counts[FIRST] if plain else counts
        return save(tensors, metadata={"second_moments": json.dumps(metadata, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "SecondMoments":
        try:
            with safe_open(path, framework="pt") as file:
                counts = json.loads((file.metadata() or {}).get("second_moments", "{}"))
                moments: dict[str, dict[int, Tensor]] = {}
                for key in file.keys():
                    encoder, _, layer = key.rpartition(".")
                    found = moments.setdefault(encoder or FIRST, {})
                    found[int(layer.removeprefix("layer_"))] = file.get_tensor(key).double()
        except Exception as error:  # safetensors raises its own, for a cut or foreign file
            raise EditingError(f"{Path(path).name} holds no second moments: {error}") from error
        if any(m.ndim != 2 or m.shape[0] != m.shape[1] for part in moments.values() for m in part.values()):
            raise EditingError(f"{Path(path).name} holds no second moments: a moment must be square")
        parts = []
        for encoder, part in sorted(moments.items()):
            own = counts.get(encoder, counts)
            captions, tokens = own.get("captions", 0), own.get("tokens", 0)
            parts.append(cls(dict(sorted(part.items())), captions=captions, tokens=tokens, encoder=encoder))
        return cls.join(parts or [cls({}, captions=0, tokens=0)])


class FactoredMoments:
    """Cholesky factors of E[k kᵀ], computed once per layer and kept.

    They serve every α and λ: the factor of (1-α)·λ·E[k kᵀ] is this one times a number.
    """

    def __init__(self, second_moments: SecondMoments) -> None:
        self.second_moments = second_moments
        self._factors: dict[int, Tensor] = {}
        self._conditions: dict[int, float] = {}

    def moment(self, layer: int) -> Tensor:
        """E[k kᵀ] (m, m) float64."""
        try:
            return self.second_moments.moments[layer]
        except KeyError:
            raise InvalidEdit(f"the second moments do not cover layer {layer}", pointer="/layers") from None

    def factor(self, layer: int) -> Tensor:
        """Lower triangular L with L Lᵀ = E[k kᵀ], (m, m) float64. Raises `SingularSecondMoment`."""
        if layer not in self._factors:
            factor = cholesky(self.moment(layer))
            if factor is None:
                raise SingularSecondMoment(
                    f"the second moments of layer {layer} have no inverse: estimate them over more captions"
                )
            self._factors[layer] = factor
        return self._factors[layer]

    def solve(self, layer: int, columns: Tensor) -> Tensor:
        """E[k kᵀ]⁻¹ times columns (m, n) float64."""
        return torch.cholesky_solve(columns, self.factor(layer).to(columns.device))

    def condition(self, layer: int) -> float:
        if layer not in self._conditions:
            self._conditions[layer] = condition_number(self.moment(layer), self.factor(layer))
        return self._conditions[layer]


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor of a symmetric matrix, or None where it is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed.item() or not factor.isfinite().all() else factor


def condition_number(matrix: Tensor, factor: Tensor) -> float:
    """The 2-norm condition of a positive definite matrix, from below, by power iteration on it and on its inverse."""

    def largest(multiply: Callable[[Tensor], Tensor]) -> Tensor:
        vector = torch.ones(len(matrix), 1, dtype=matrix.dtype, device=matrix.device)
        for _ in range(30):
            vector = multiply(vector / vector.norm())
        return vector.norm()

    return float(largest(lambda vector: matrix @ vector) * largest(lambda vector: torch.cholesky_solve(vector, factor)))


@torch.no_grad()
def estimate_second_moments(
    encoder: EditableEncoder,
    captions: Iterable[str],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> SecondMoments:
    """E[k kᵀ] of the given layers over captions, streamed: memory holds one batch and the sums.

    Every token counts once, BOS and EOS with it; a caption too long is cut as inference cuts it. Sums are float64.
    `progress` is called with the number of captions read so far.
    """
    layers = encoder.default_edited_layers if layers is None else tuple(sorted(layers))
    m = encoder.mlp_width
    sums = {layer: torch.zeros(m, m, dtype=torch.float64, device=encoder.device) for layer in layers}
    read = tokens = 0
    stream = iter(captions)
    while batch := list(islice(stream, batch_size)):
        prompts = [encoder.tokenizer.encode(caption).ids for caption in batch]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=encoder.device)
        states = encoder.embed(encoder.ids(prompts, full_length=False))
        attended = torch.arange(states.shape[1], device=encoder.device) < lengths[:, None]  # (b, s)
        for layer in range(max(layers) + 1):
            stream_, keys = encoder.attend(layer, states)
            if layer in sums:
                chosen = keys[attended].double()  # (tokens, m)
                sums[layer] += chosen.T @ chosen
            states = stream_ + encoder.fc2(layer)(keys)
        read += len(batch)
        tokens += int(lengths.sum())
        if progress:
            progress(read)
    if not tokens:
        raise EditingError("no captions to estimate second moments from")
    moments = {layer: (total / tokens).float().double().cpu() for layer, total in sums.items()}
    return SecondMoments(moments, captions=read, tokens=tokens, encoder=encoder.name)
