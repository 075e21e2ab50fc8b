"""Second moments of the keys, E[k kᵀ] per layer: what the text encoder's memories are asked for in everyday use."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from torch.linalg import solve_triangular

from editing import ENGINE_VERSION
from editing.encoders import EditableEncoder
from editing.errors import EditingError, ForeignSums, InvalidEdit, SingularSecondMoment
from editing.files import write_whole
from editing.prompts import PromptTokenizer

Batch = list[tuple[int, ...]]
"""Token ids of prompts that are encoded together."""

_WINDOW = 64  # batches whose captions are sorted by length: bounds what is held of the stream
_BLOCK = 512  # rows of a moment added at once
_SAVING_SHARE = 0.05  # of the time may go to saving partial sums

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
        """The safetensors file: `layer_{i}`, the upper triangle row by row, (m(m+1)/2,) float32, and one JSON metadata
        string. Equal sets give equal bytes.

        Where there is more than the first encoder, the keys say which: `{encoder}.layer_{i}`.
        """
        plain = not self.others and self.encoder == FIRST
        tensors = {
            f"{'' if plain else f'{part.encoder}.'}layer_{layer}": _packed(moment).float().cpu()
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


class FactoredMoments:
    """Cholesky factors of one encoder's E[k kᵀ], computed once per layer and kept: in memory, or in files of a folder.

    They serve every α and λ: the factor of (1-α)·λ·E[k kᵀ] is this one times a number. With a folder nothing is held in
    memory: a factor lies at `<digest of the moments>/<encoder>.layer_<i>.safetensors`, (m, m) float64, and is checked
    against its own sha256 at each reading; one that is cut or changed is computed again. Anyone may empty the folder.
    """

    def __init__(
        self,
        second_moments: SecondMoments | Path,
        *,
        encoder: str = FIRST,
        folder: Path | None = None,
        digest: str = "",
    ) -> None:
        """`second_moments` may be their file, read layer by layer where it is needed; `digest` saves hashing it."""
        self.encoder = encoder
        self._moments = second_moments
        self._folder = None
        if folder is not None:
            self._folder = folder / (digest or _digest(second_moments))
            self._folder.mkdir(parents=True, exist_ok=True)
        self._factors: dict[int, Tensor] = {}
        self._conditions: dict[int, float] = {}

    def moment(self, layer: int) -> Tensor:
        """E[k kᵀ] (m, m) float64."""
        moments = self._moments
        if isinstance(moments, Path):
            moments = SecondMoments.load(moments, layers=[layer])
        try:
            return moments.of(self.encoder).moments[layer]
        except KeyError:
            raise InvalidEdit(f"the second moments do not cover layer {layer}", pointer="/layers") from None

    def factor(self, layer: int) -> Tensor:
        """Lower triangular L with L Lᵀ = E[k kᵀ], (m, m) float64. Raises `SingularSecondMoment`."""
        if layer in self._factors:
            return self._factors[layer]
        factor = self._read(layer)
        if factor is None:
            moment = self.moment(layer)
            factor = cholesky(moment)
            if factor is None:
                raise SingularSecondMoment(
                    f"the second moments of layer {layer} have no inverse: estimate them over more captions"
                )
            factor = factor.contiguous()  # as it is read back: another layout, other bits of what is solved with it
            self._conditions[layer] = condition_number(moment, factor)
            self._write(layer, factor)
        if self._folder is None:
            self._factors[layer] = factor
        return factor

    def condition(self, layer: int) -> float:
        """Condition number of E[k kᵀ]."""
        if layer not in self._conditions:
            self.factor(layer)
        return self._conditions[layer]

    def _read(self, layer: int) -> Tensor | None:
        """The factor in the folder, and its moment's condition number; None where there is no whole one."""
        if self._folder is None:
            return None
        try:
            with safe_open(self._folder / f"{self.encoder}.layer_{layer}.safetensors", framework="pt") as file:
                factor, condition = file.get_tensor("factor").clone(), file.get_tensor("condition")
                written = file.metadata()["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        if _sha256(factor, condition) != written:
            return None
        self._conditions[layer] = float(condition)
        return factor

    def _write(self, layer: int, factor: Tensor) -> None:
        if self._folder is not None:
            tensors = {"factor": factor.cpu(), "condition": torch.tensor(self._conditions[layer], dtype=torch.float64)}
            content = save(tensors, metadata={"sha256": _sha256(*tensors.values())})
            write_whole(self._folder / f"{self.encoder}.layer_{layer}.safetensors", content)


def _digest(second_moments: SecondMoments | Path) -> str:
    if isinstance(second_moments, SecondMoments):
        return second_moments.digest
    with second_moments.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(factor: Tensor, condition: Tensor) -> str:
    sha256 = hashlib.sha256(f"{tuple(factor.shape)} {factor.dtype} {float(condition)!r}".encode())
    sha256.update(factor.numpy().data)
    return sha256.hexdigest()


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

    def divide(vector: Tensor) -> Tensor:  # cholesky_solve would copy the factor each time
        return solve_triangular(factor.T, solve_triangular(factor, vector, upper=False), upper=True)

    return float(largest(lambda vector: matrix @ vector) * largest(divide))


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
        return SecondMoments(moments, captions=self.captions, tokens=self.tokens, encoder=self.encoder.name)


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
