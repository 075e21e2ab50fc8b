"""Cholesky factors of second moments, and what else stage II asks of a positive definite matrix."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.linalg import solve_triangular

from editing.errors import InvalidEdit, SingularSecondMoment
from editing.files import write_atomically
from editing.second_moments.moments import FIRST, SecondMoments


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
            factor = factorize(moment)
            if factor is None:
                raise SingularSecondMoment(
                    f"the second moments of layer {layer} have no inverse: estimate them over more captions"
                )
            factor = factor.contiguous()  # as it is read back: another layout, other bits of what is solved with it
            self._conditions[layer] = estimate_condition_number(moment, factor)
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
            write_atomically(self._folder / f"{self.encoder}.layer_{layer}.safetensors", content)


def _digest(second_moments: SecondMoments | Path) -> str:
    if isinstance(second_moments, SecondMoments):
        return second_moments.digest
    with second_moments.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(factor: Tensor, condition: Tensor) -> str:
    sha256 = hashlib.sha256(f"{tuple(factor.shape)} {factor.dtype} {float(condition)!r}".encode())
    sha256.update(factor.numpy().data)
    return sha256.hexdigest()


def factorize(matrix: Tensor) -> Tensor | None:
    """The lower factor of a symmetric matrix, or None where it is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed.item() or not factor.isfinite().all() else factor


def estimate_condition_number(matrix: Tensor, factor: Tensor) -> float:
    """The 2-norm condition of a positive definite matrix, from below, by power iteration on it and on its inverse."""

    def largest(multiply: Callable[[Tensor], Tensor]) -> Tensor:
        vector = torch.ones(len(matrix), 1, dtype=matrix.dtype, device=matrix.device)
        for _ in range(30):
            vector = multiply(vector / vector.norm())
        return vector.norm()

    def divide(vector: Tensor) -> Tensor:  # cholesky_solve would copy the factor each time
        return solve_triangular(factor.T, solve_triangular(factor, vector, upper=False), upper=True)

    return float(largest(lambda vector: matrix @ vector) * largest(divide))
