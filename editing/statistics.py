"""Second moments of the keys, E[k kᵀ] per layer: what the text encoder's memories are asked for in everyday use."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from editing import ENGINE_VERSION
from editing.encoders import EditableEncoder
from editing.errors import EditingError, ForeignSums, InvalidEdit, SingularSecondMoment
from editing.prompts import PromptTokenizer

Batch = list[tuple[int, ...]]
"""Token ids of prompts that are encoded together."""

_WINDOW = 64  # batches whose captions are sorted by length: bounds what is held of the stream
_BLOCK = 512  # rows of a moment added at once
_SAVING_SHARE = 0.05  # of the time may go to saving partial sums


@dataclass(frozen=True)
class SecondMoments:
    """E[k kᵀ] per layer, (m, m) float64, over every token of the captions with BOS and EOS, no padding.

    The values are those of the file's float32, so that a set just estimated and the same set read back are equal.
    """

    moments: Mapping[int, Tensor]
    captions: int
    tokens: int

    @cached_property
    def digest(self) -> str:
        """sha256 of the file that `to_bytes` gives."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The safetensors file: `layer_{i}`, the upper triangle row by row, (m(m+1)/2,) float32, and one JSON metadata
        string. Equal sets give equal bytes."""
        tensors = {f"layer_{layer}": _packed(moment).float().cpu() for layer, moment in sorted(self.moments.items())}
        metadata = {"captions": self.captions, "tokens": self.tokens}
        return save(tensors, metadata={"second_moments": json.dumps(metadata, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`, or one that holds each `layer_{i}` as a whole matrix (m, m)."""
        try:
            with safe_open(path, framework="pt") as file:
                counts = json.loads((file.metadata() or {}).get("second_moments", "{}"))
                moments = {int(key.removeprefix("layer_")): _symmetric(file.get_tensor(key)) for key in file.keys()}
        except Exception as error:  # safetensors raises its own, for a cut or foreign file
            raise EditingError(f"{Path(path).name} holds no second moments: {error}") from error
        return cls(dict(sorted(moments.items())), captions=counts.get("captions", 0), tokens=counts.get("tokens", 0))


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
    partial: str | Path | None = None,
) -> SecondMoments:
    """E[k kᵀ] of the given layers over captions, streamed: memory holds some batches' captions and the sums.

    Every token counts once, BOS and EOS with it; a caption too long is cut as inference cuts it. Sums are float64.
    `progress` is called with the number of captions counted so far; what it raises ends the run.

    `partial` names a file in which the sums are kept every now and then. A run that finds it there goes on from it, and
    gives the bits of a run that was never interrupted. Raises `ForeignSums` where it is of another encoder, of other
    captions, layers or batches. The file is the caller's to delete.
    """
    layers = encoder.default_edited_layers if layers is None else tuple(sorted(layers))
    batches = _batches(encoder.tokenizer, captions, size=batch_size)
    sums = _Sums(encoder, layers)
    kept = _PartialSums(Path(partial), sums) if partial is not None else None
    if kept and kept.resume(batches) and progress:
        progress(sums.captions)
    for batch in batches:
        sums.add(batch)
        if kept:
            kept.added(batch)
        if progress:
            progress(sums.captions)
    return sums.mean()


class _Sums:
    """Σ k kᵀ of each layer over the batches added, float64: of the upper triangle alone, for half the work."""

    def __init__(self, encoder: EditableEncoder, layers: Sequence[int]) -> None:
        m = encoder.mlp_width
        self.encoder = encoder
        self.layers = {layer: torch.zeros(m, m, dtype=torch.float64, device=encoder.device) for layer in layers}
        self.captions = self.tokens = 0

    def add(self, batch: Batch) -> None:
        encoder = self.encoder
        lengths = torch.tensor([len(prompt) for prompt in batch], device=encoder.device)
        states = encoder.embed(encoder.ids(batch, full_length=False))  # (b, s, d)
        attended = torch.arange(states.shape[1], device=encoder.device) < lengths[:, None]  # (b, s)
        for layer in range(max(self.layers) + 1):
            stream, keys = encoder.attend(layer, states)
            if layer in self.layers:
                _add_products(self.layers[layer], keys[attended].double())
            states = stream + encoder.fc2(layer)(keys)
        self.captions += len(batch)
        self.tokens += int(lengths.sum())

    def mean(self) -> SecondMoments:
        """E[k kᵀ]. The sums are given up layer by layer: memory has no room for both."""
        if not self.tokens:
            raise EditingError("no captions to estimate second moments from")
        moments = {}
        for layer in sorted(self.layers):
            moments[layer] = _mirrored((self.layers.pop(layer) / self.tokens).float()).double().cpu()
        return SecondMoments(moments, captions=self.captions, tokens=self.tokens)


class _PartialSums:
    """Sums kept in a file, so that a run that was killed goes on where it was.

    The file's `trace` is the sha256 of all that went into the sums: encoder, layers, and every batch in its order.
    """

    def __init__(self, path: Path, sums: _Sums) -> None:
        self.path = path
        self._sums = sums
        self._trace = hashlib.sha256(_fingerprint(sums.encoder, tuple(sums.layers)))
        self._due = 0.0

    def resume(self, batches: Iterator[Batch]) -> bool:
        """Take up the sums in the file, if there is one, and pass over the batches that they hold."""
        if not self.path.exists():
            return False
        captions, tokens, trace, totals = self._read()
        passed = 0
        while passed < captions and (batch := next(batches, None)):
            self._trace.update(repr(batch).encode())
            passed += len(batch)
        if self._trace.hexdigest() != trace:
            raise ForeignSums(
                f"{self.path.name} holds sums of another encoder, other captions, layers or batches; "
                "delete it to begin anew"
            )
        for layer, total in self._sums.layers.items():
            total.copy_(_unpacked(totals[layer]))
        self._sums.captions, self._sums.tokens = captions, tokens
        return True

    def _read(self) -> tuple[int, int, str, dict[int, Tensor]]:
        """Captions, tokens and trace of the file, and its sums as they are packed."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads(file.metadata()["partial_sums"])
                totals = {int(key.removeprefix("layer_")): file.get_tensor(key) for key in file.keys()}
                return facts["captions"], facts["tokens"], facts["trace"], totals
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ForeignSums(f"{self.path.name} holds no partial sums: {error}; delete it to begin anew") from error

    def added(self, batch: Batch) -> None:
        """Note a batch that was added to the sums; write them where the last time is long enough ago."""
        self._trace.update(repr(batch).encode())
        start = time.monotonic()
        if start < self._due:
            return
        self._save()
        end = time.monotonic()
        self._due = end + (end - start) / _SAVING_SHARE

    def _save(self) -> None:
        """Whole or not at all, even if the machine is switched off."""
        facts = {"captions": self._sums.captions, "tokens": self._sums.tokens, "trace": self._trace.hexdigest()}
        tensors = {f"layer_{layer}": _packed(total).cpu() for layer, total in self._sums.layers.items()}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"partial_sums": json.dumps(facts)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _batches(tokenizer: PromptTokenizer, captions: Iterable[str], *, size: int) -> Iterator[Batch]:
    """Prompts of about one length together, so that there is little padding: each window of the captions is sorted."""
    stream = enumerate(captions)
    while window := [
        tokenizer.encode(caption, pointer=f"/captions/{n}").ids for n, caption in islice(stream, _WINDOW * size)
    ]:
        window.sort(key=len)
        for start in range(0, len(window), size):
            yield window[start : start + size]


def _fingerprint(encoder: EditableEncoder, layers: tuple[int, ...]) -> bytes:
    """sha256 of what makes the keys of these layers: the engine, the modules and their weights."""
    parts = torch.nn.ModuleList([encoder.embeddings, *encoder.layers[: max(layers) + 1]])
    digest = hashlib.sha256(f"{ENGINE_VERSION} {layers} {parts}".encode())
    for name, weight in parts.state_dict().items():
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def _add_products(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the upper triangle of total (m, m), block of rows by block; keys (t, m).

    What a block reaches below the diagonal means nothing. At m = 3072 this takes 0.55 of the time of the whole product.
    """
    for start in range(0, len(total), _BLOCK):
        total[start : start + _BLOCK, start:].addmm_(keys[:, start : start + _BLOCK].T, keys[:, start:])


def _mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle this is."""
    return matrix.triu() + matrix.triu(1).T


def _packed(matrix: Tensor) -> Tensor:
    """The upper triangle of (m, m) row by row, (m(m+1)/2,)."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu()]


def _unpacked(packed: Tensor) -> Tensor:
    """The symmetric matrix (m, m) of which `_packed` made this. Raises ValueError for another length."""
    m = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    if m * (m + 1) // 2 != len(packed):
        raise ValueError(f"{len(packed)} numbers are no triangle")
    matrix = packed.new_zeros(m, m)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu()] = packed
    return _mirrored(matrix)


def _symmetric(stored: Tensor) -> Tensor:
    """A moment of a file, packed or a whole matrix, as (m, m) float64. Raises ValueError for what is neither."""
    if stored.ndim == 1:
        return _unpacked(stored).double()
    if stored.ndim != 2 or stored.shape[0] != stored.shape[1]:
        raise ValueError("a moment must be square")
    if not torch.allclose(stored, stored.T, rtol=1e-3, atol=float(stored.abs().max()) * 1e-5):
        raise ValueError("a moment must be symmetric")
    return _mirrored(stored).double()
