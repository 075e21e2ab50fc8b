"""The optimizers of stage I. They run on a batch of rows: each row moves as if it were alone, and rows come and go.

The caller evaluates losses and gradients at `points` and passes them to `step`; `best` has the result so far. Every
tensor of the state has one entry per row, so that `keep` and `join` handle all of them alike.

Shapes: e rows, d width of δ, k pairs in the history of L-BFGS.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LimitNorm = Callable[[Tensor], Tensor]
"""Shortens every row of δ (e, d) to the length that it may have."""

_ARMIJO = 1e-4  # share of the predicted decrease that a step must reach (Nocedal and Wright, section 3.1)
_MIN_CURVATURE = 1e-10  # sᵀy below this share of yᵀy is no curvature information


class RowOptimizer(ABC):
    """`state` has at least `points` and `best` (e, d), `losses` (e,) at `best`, and `converged` (e,)."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.state = {name: entries[list(rows)] for name, entries in self.state.items()}

    def join(self, deltas: Tensor, **own: Tensor) -> None:
        """Add rows that start at `deltas` (e, d), each with this optimizer's own parameters."""
        new = self._start_rows(deltas, **own)
        if self.state:
            new = {name: torch.cat([entries, new[name]]) for name, entries in self.state.items()}
        self.state = new

    @property
    def points(self) -> Tensor:
        """Where the next losses and gradients are evaluated, (e, d)."""
        return self.state["points"]

    @property
    def best(self) -> Tensor:
        """The result of each row so far, (e, d)."""
        return self.state["best"]

    @property
    def losses(self) -> Tensor:
        """The last loss that each row accepted, (e,); infinite before the first."""
        return self.state["losses"]

    @property
    def converged(self) -> Tensor:
        """The rows that cannot lower their loss any further, (e,) bool."""
        return self.state["converged"]

    @abstractmethod
    def _start_rows(self, deltas: Tensor, **own: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def step(self, losses: Tensor, gradients: Tensor, limit_norm: LimitNorm) -> Tensor:
        """Move, given the losses (e,) and gradients (e, d) at `points`.

        Returns which rows accepted their point, (e,) bool: a line search rejects points that are no better.
        """


class Adam(RowOptimizer):
    """Adam (arXiv:1412.6980) with a learning rate (e,) and a step count for each row.

    `torch.optim.Adam` with one parameter per row spends more time in Python than a text step takes: see
    docs/decisions/0009.
    """

    def _start_rows(self, deltas: Tensor, **own: Tensor) -> dict[str, Tensor]:
        e, device = len(deltas), deltas.device
        return {
            "points": deltas,
            "best": deltas,
            "losses": torch.full((e,), torch.inf, device=device),
            "converged": torch.zeros(e, dtype=torch.bool, device=device),
            "rate": own["learning_rate"][:, None],  # (e, 1)
            "steps": torch.zeros(e, 1, device=device),
            "mean": torch.zeros_like(deltas),  # first moment of the gradient
            "square": torch.zeros_like(deltas),  # second moment of the gradient
        }

    def step(self, losses: Tensor, gradients: Tensor, limit_norm: LimitNorm) -> Tensor:
        state = self.state
        state["losses"] = losses
        state["steps"] = steps = state["steps"] + 1
        state["mean"] = mean = 0.9 * state["mean"] + 0.1 * gradients
        state["square"] = square = 0.999 * state["square"] + 0.001 * gradients.square()
        # 1 - βᵗ corrects the bias of moments that start at 0.
        scale = (square / (1 - 0.999**steps)).sqrt() + 1e-8
        state["points"] = state["best"] = limit_norm(self.points - state["rate"] * (mean / (1 - 0.9**steps)) / scale)
        return torch.ones_like(losses, dtype=torch.bool)


class LBFGS(RowOptimizer):
    """L-BFGS (Nocedal, 1980) with backtracking and one evaluation of every row per step. For losses without noise.

    A row's first step has the length `initial_step` (e,). A point is accepted if the loss fell enough (Armijo); else a
    shorter step is tried (Nocedal and Wright, section 3.5). After eight rejections the row drops its curvature. If it
    then cannot descend along its gradient either, it has converged.
    """

    history = 10
    max_rejections = 8

    def _start_rows(self, deltas: Tensor, **own: Tensor) -> dict[str, Tensor]:
        (e, d), device = deltas.shape, deltas.device
        return {
            "points": deltas,
            "best": deltas,
            "losses": torch.full((e,), torch.inf, device=device),
            "converged": torch.zeros(e, dtype=torch.bool, device=device),
            "initial_step": own["initial_step"][:, None],  # (e, 1)
            "gradients": torch.zeros_like(deltas),  # at `best`
            "length": torch.ones(e, 1, device=device),  # of the step, in units of the direction
            "rejections": torch.zeros(e, device=device),
            "scale": torch.zeros(e, 1, device=device),  # of the initial inverse Hessian; 0: no curvature is known
            "s_history": torch.zeros(e, self.history, d, device=device),  # s = x_{k+1} - x_k, oldest first
            "y_history": torch.zeros(e, self.history, d, device=device),  # y = g_{k+1} - g_k
            "rho": torch.zeros(e, self.history, 1, device=device),  # 1 / sᵀy; 0: no pair yet
        }

    def step(self, losses: Tensor, gradients: Tensor, limit_norm: LimitNorm) -> Tensor:
        state = self.state
        s, y = self.points - self.best, gradients - state["gradients"]  # (e, d)
        slope = (s * state["gradients"]).sum(1)  # (e,): the change of the loss if it were linear
        accepted = (losses <= self.losses + _ARMIJO * slope) & (losses < self.losses)
        # Next length after a rejection: the minimum of the parabola through both losses, at most a half of this one.
        # It is NaN where a loss is not finite.
        shrink = (-slope / (2 * (losses - self.losses - slope))).nan_to_num(0.1).clamp(0.1, 0.5)
        self._add_pairs(s, y, where=accepted & self.losses.isfinite())
        state["best"] = torch.where(accepted[:, None], self.points, self.best)
        state["gradients"] = torch.where(accepted[:, None], gradients, state["gradients"])
        state["losses"] = torch.where(accepted, losses, self.losses)
        state["length"] = torch.where(accepted[:, None], 1.0, state["length"] * shrink[:, None])
        state["rejections"] = torch.where(accepted, 0, state["rejections"] + 1)
        self._drop_curvature(state["rejections"] >= self.max_rejections)
        state["points"] = limit_norm(self.best - state["length"] * self._direction())
        return accepted

    def _add_pairs(self, s: Tensor, y: Tensor, *, where: Tensor) -> None:
        """Add the pairs (s, y) of these rows (e,) to their history, if the loss is convex along s."""
        curvature, square = (s * y).sum(1, keepdim=True), y.square().sum(1, keepdim=True)  # sᵀy, yᵀy (e, 1)
        convex = where[:, None] & (curvature > _MIN_CURVATURE * square)
        state = self.state
        state["scale"] = torch.where(convex, curvature / square, state["scale"])  # γ = sᵀy / yᵀy
        for name, newest in (("s_history", s), ("y_history", y), ("rho", 1 / curvature)):
            shifted = torch.cat([state[name][:, 1:], newest[:, None]], 1)  # the oldest pair drops out
            state[name] = torch.where(convex[:, :, None], shifted, state[name])

    def _drop_curvature(self, stuck: Tensor) -> None:
        """Forget the history of these rows (e,). A row that had none has converged."""
        state = self.state
        state["converged"] = self.converged | (stuck & (state["scale"][:, 0] == 0))
        for name, fresh in (("scale", 0.0), ("length", 1.0)):
            state[name] = torch.where(stuck[:, None], fresh, state[name])
        state["rho"] = torch.where(stuck[:, None, None], 0.0, state["rho"])
        state["rejections"] = torch.where(stuck, 0, state["rejections"])

    def _direction(self) -> Tensor:
        """Return the inverse Hessian times the gradient (e, d): the two-loop recursion of L-BFGS.

        An empty pair has ρ = 0 and changes nothing (Nocedal and Wright, algorithm 7.4).
        """
        state, direction = self.state, self.state["gradients"]
        pairs = [(state["s_history"][:, i], state["y_history"][:, i], state["rho"][:, i]) for i in range(self.history)]
        alphas = []
        for s, y, rho in reversed(pairs):
            alphas.append(rho * (s * direction).sum(1, keepdim=True))  # α_i = ρ_i s_iᵀ q
            direction = direction - alphas[-1] * y  # q ← q - α_i y_i
        # r = γ q. Without curvature it is the gradient, scaled to the length of the first step.
        first = state["initial_step"] * torch.nn.functional.normalize(direction, dim=1, eps=1e-30)
        direction = torch.where(state["scale"] > 0, state["scale"] * direction, first)
        for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            direction = direction + (alpha - rho * (y * direction).sum(1, keepdim=True)) * s  # r ← r + s_i (α_i - β)
        return direction
