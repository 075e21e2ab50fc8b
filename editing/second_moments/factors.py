"""Cholesky factors of second moments, kept for many solves.

Shapes: m MLP width, the width of the keys.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.linalg import solve_triangular

from editing.errors import InvalidEdit, SingularSecondMoment
from editing.files import hash_file, replace_atomically
from editing.second_moments.moments import FIRST_ENCODER, SecondMoments


class FactoredMoments:
    """Cholesky factors of one encoder's E[k kᵀ], computed once per layer and kept in memory or in a folder.

    They serve every α and λ: the factor of (1-α)·λ·E[k kᵀ] is this one times a number. With a folder, nothing is kept
    in memory. A factor is stored in `<digest of the moments>/<encoder>.layer_<i>.safetensors`, (m, m) float64, and
    checked against its sha256 whenever it is read. A damaged one is computed again. The folder may be emptied anytime.
    """

    def __init__(
        self,
        second_moments: SecondMoments | Path,
        *,
        encoder: str = FIRST_ENCODER,
        folder: Path | None = None,
        digest: str = "",
    ) -> None:
        """`second_moments` may be their file, which is read layer by layer. `digest` is its sha256, if it is known."""
        self.encoder = encoder
        self._moments = second_moments
        self._folder = None
        if folder is not None:
            self._folder = folder / (digest or _hash_moments(second_moments))
            self._folder.mkdir(parents=True, exist_ok=True)
        self._factors: dict[int, Tensor] = {}
        self._conditions: dict[int, float] = {}

    def load_moment(self, layer: int) -> Tensor:
        """Return E[k kᵀ] (m, m) float64. Raises `InvalidEdit` for a layer that the moments lack."""
        moments = self._moments
        if isinstance(moments, Path):
            moments = SecondMoments.load(moments, layers=[layer])
        try:
            return moments.select(self.encoder).moments[layer]
        except KeyError:
            raise InvalidEdit(
                f"there are no second moments of layer {layer}: estimate them, or change layers", pointer="/layers"
            ) from None

    def load_factor(self, layer: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Return the lower triangular L with L Lᵀ = E[k kᵀ], (m, m) float64, computed and kept on this device.

        Raises `SingularSecondMoment`.
        """
        if layer in self._factors:
            return self._factors[layer].to(device)
        factor = self._read(layer)
        if factor is None:
            moment = self.load_moment(layer).to(device)
            # Moments of a large encoder take most of a gigabyte: those of a file are not needed any more.
            factor = factorize(moment, in_place=isinstance(self._moments, Path))
            del moment
            if factor is None:
                raise SingularSecondMoment(
                    f"the second moments of layer {layer} have no inverse: estimate them from more captions"
                )
            self._conditions[layer] = estimate_condition_number(factor)
            self._write(layer, factor)
        factor = factor.to(device)
        if self._folder is None:
            self._factors[layer] = factor
        return factor

    def load_condition(self, layer: int) -> float:
        """Return the condition number of E[k kᵀ]."""
        if layer not in self._conditions:
            self.load_factor(layer)
        return self._conditions[layer]

    def _read(self, layer: int) -> Tensor | None:
        """Read the factor from the folder, and note its moment's condition number. None if it is missing or damaged."""
        if self._folder is None:
            return None
        try:
            with safe_open(self._folder / f"{self.encoder}.layer_{layer}.safetensors", framework="pt") as file:
                factor, condition = file.get_tensor("factor").clone(), file.get_tensor("condition")
                sha256 = file.metadata()["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        if _hash_factor(factor, condition) != sha256:
            return None
        self._conditions[layer] = float(condition)
        return factor

    def _write(self, layer: int, factor: Tensor) -> None:
        if self._folder is not None:
            tensors = {"factor": factor.cpu(), "condition": torch.tensor(self._conditions[layer], dtype=torch.float64)}
            with replace_atomically(self._folder / f"{self.encoder}.layer_{layer}.safetensors") as temporary:
                save_file(tensors, temporary, metadata={"sha256": _hash_factor(*tensors.values())})


def _hash_moments(second_moments: SecondMoments | Path) -> str:
    return second_moments.digest if isinstance(second_moments, SecondMoments) else hash_file(second_moments)


def _hash_factor(factor: Tensor, condition: Tensor) -> str:
    sha256 = hashlib.sha256(f"{tuple(factor.shape)} {factor.dtype} {float(condition)!r}".encode())
    sha256.update(factor.numpy().data)
    return sha256.hexdigest()


def factorize(matrix: Tensor, *, in_place: bool = False) -> Tensor | None:
    """Return the lower Cholesky factor of a symmetric matrix, or None if it is not positive definite.

    The factor is contiguous, as one that is read from a file: another layout gives other bits in the solves. In place,
    it takes the memory of the matrix, which must be contiguous.
    """
    # LAPACK stores by columns. The transpose of its upper factor is the lower one, stored by rows.
    upper = matrix.mT if in_place else matrix.mT.clone()
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(upper, upper=True, out=(upper, failed))
    return None if failed.item() or not upper.isfinite().all() else upper.mT


def estimate_condition_number(factor: Tensor) -> float:
    """Estimate the 2-norm condition of a positive definite matrix (m, m) from its lower Cholesky factor.

    It is the product of the largest eigenvalues of the matrix and of its inverse, each by 30 power iterations, which
    approach them from below.
    """

    def find_largest(multiply: Callable[[Tensor], Tensor]) -> Tensor:
        vector = torch.ones(len(factor), 1, dtype=factor.dtype, device=factor.device)
        for _ in range(30):
            vector = multiply(vector / vector.norm())
        return vector.norm()

    def divide(vector: Tensor) -> Tensor:  # torch.cholesky_solve would copy the factor each time
        return solve_triangular(factor.T, solve_triangular(factor, vector, upper=False), upper=True)

    return float(find_largest(lambda vector: factor @ (factor.T @ vector)) * find_largest(divide))
