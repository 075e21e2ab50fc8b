"""Second moments of the keys, E[k kᵀ] per layer: what the text encoder's memories are asked for in everyday use."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.linalg import solve_triangular

from editing.encoders import EditableEncoder
from editing.errors import EditingError, InvalidEdit, SingularSecondMoment
from editing.files import write_whole


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
        """The safetensors file: `layer_{i}` in float32 and one JSON metadata string. Equal sets give equal bytes."""
        tensors = {
            f"layer_{layer}": moment.float().cpu().contiguous() for layer, moment in sorted(self.moments.items())
        }
        metadata = {"captions": self.captions, "tokens": self.tokens}
        return save(tensors, metadata={"second_moments": json.dumps(metadata, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[int] | None = None) -> Self:
        """Read the file, or only these of its layers."""
        try:
            with safe_open(path, framework="pt") as file:
                counts = json.loads((file.metadata() or {}).get("second_moments", "{}"))
                keys = {int(key.removeprefix("layer_")): key for key in file.keys()}
                wanted = sorted(keys.keys() if layers is None else keys.keys() & set(layers))
                moments = {layer: file.get_tensor(keys[layer]).double() for layer in wanted}
        except Exception as error:  # safetensors raises its own, for a cut or foreign file
            raise EditingError(f"{Path(path).name} holds no second moments: {error}") from error
        if any(moment.ndim != 2 or moment.shape[0] != moment.shape[1] for moment in moments.values()):
            raise EditingError(f"{Path(path).name} holds no second moments: a moment must be square")
        return cls(moments, captions=counts.get("captions", 0), tokens=counts.get("tokens", 0))


class FactoredMoments:
    """Cholesky factors of E[k kᵀ], computed once per layer and kept: in memory, or in files of a folder.

    They serve every α and λ: the factor of (1-α)·λ·E[k kᵀ] is this one times a number. With a folder nothing is held in
    memory: a factor lies at `<digest of the moments>/layer_<i>.safetensors`, (m, m) float64, and is checked against its
    own sha256 at each reading; one that is cut or changed is computed again. Anyone may empty the folder.
    """

    def __init__(self, second_moments: SecondMoments | Path, *, folder: Path | None = None, digest: str = "") -> None:
        """`second_moments` may be their file, read layer by layer where it is needed; `digest` saves hashing it."""
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
            return moments.moments[layer]
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
            with safe_open(self._folder / f"layer_{layer}.safetensors", framework="pt") as file:
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
            write_whole(self._folder / f"layer_{layer}.safetensors", content)


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
    return SecondMoments(moments, captions=read, tokens=tokens)
