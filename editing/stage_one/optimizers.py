"""The optimisers of stage I, over the rows of a batch: each row moves as if it were alone, and rows come and go.

An optimiser says where it wants losses and gradients (`points`), is told them (`step`), and has what it holds best
(`found`). All of its state has a row's entries along the first dimension, so that `keep` and `join` are one line.

Shapes: e rows, d width of δ, k pairs of L-BFGS' memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Clamp = Callable[[Tensor], Tensor]
"""Pulls every row of δ (e, d) back to the length that it may have."""


class RowOptimizer(ABC):
    """`state` has at least `points` and `found` (e, d), `losses` (e,) at `found`, and `converged` (e,)."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        self.state = {name: entries[list(rows)] for name, entries in self.state.items()}

    def join(self, deltas: Tensor, **own: Tensor) -> None:
        """New rows start at `deltas` (e, d), each with what this optimiser wants to know of it."""
        new = self._fresh(deltas, **own)
        if self.state:
            new = {name: torch.cat([entries, new[name]]) for name, entries in self.state.items()}
        self.state = new

    @property
    def points(self) -> Tensor:
        """Where losses and gradients are wanted, (e, d)."""
        return self.state["points"]

    @property
    def found(self) -> Tensor:
        """What each row has come to, (e, d)."""
        return self.state["found"]

    @property
    def losses(self) -> Tensor:
        """The last losses that each row took, (e,); infinite where it never took one."""
        return self.state["losses"]

    @property
    def converged(self) -> Tensor:
        """The rows that can do no better, (e,) bool."""
        return self.state["converged"]

    @abstractmethod
    def _fresh(self, deltas: Tensor, **own: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def step(self, losses: Tensor, gradients: Tensor, clamp: Clamp) -> Tensor:
        """Move, given the losses (e,) and their gradients (e, d) at `points`. Which rows took their loss, (e,) bool:
        a line search passes over a point that is no better."""


class Adam(RowOptimizer):
    """Adam (arXiv:1412.6980) with each row's own learning rate (e,) and its own count of steps.

    `torch.optim.Adam` on one parameter a row spends more time in Python than a text step takes: docs/decisions/0009.
    """

    def _fresh(self, deltas: Tensor, **own: Tensor) -> dict[str, Tensor]:
        e, device = len(deltas), deltas.device
        return {
            "points": deltas,
            "found": deltas,
            "losses": torch.full((e,), torch.inf, device=device),
            "converged": torch.zeros(e, dtype=torch.bool, device=device),
            "rate": own["learning_rate"][:, None],
            "steps": torch.zeros(e, 1, device=device),
            "mean": torch.zeros_like(deltas),
            "square": torch.zeros_like(deltas),
        }

    def step(self, losses: Tensor, gradients: Tensor, clamp: Clamp) -> Tensor:
        state = self.state
        state["losses"] = losses
        state["steps"] = steps = state["steps"] + 1
        state["mean"] = mean = 0.9 * state["mean"] + 0.1 * gradients
        state["square"] = square = 0.999 * state["square"] + 0.001 * gradients.square()
        scale = (square / (1 - 0.999**steps)).sqrt() + 1e-8
        state["points"] = state["found"] = clamp(self.points - state["rate"] * (mean / (1 - 0.9**steps)) / scale)
        return torch.ones_like(losses, dtype=torch.bool)


class LBFGS(RowOptimizer):
    """L-BFGS (Nocedal, 1980) with backtracking, one evaluation of every row a step; for losses without noise.

    A row's first step is `radius` (e,) long. A point is taken where the loss fell enough (Armijo); else a shorter step
    is tried (Nocedal and Wright, section 3.5), and after eight the row forgets its curvature. One that then cannot
    descend along its gradient either has converged.
    """

    memory = 10
    tries = 8

    def _fresh(self, deltas: Tensor, **own: Tensor) -> dict[str, Tensor]:
        (e, d), device = deltas.shape, deltas.device
        return {
            "points": deltas,
            "found": deltas,
            "losses": torch.full((e,), torch.inf, device=device),
            "converged": torch.zeros(e, dtype=torch.bool, device=device),
            "radius": own["radius"][:, None],
            "gradients": torch.zeros_like(deltas),
            "length": torch.ones(e, 1, device=device),
            "misses": torch.zeros(e, device=device),
            "scale": torch.zeros(e, 1, device=device),  # of the inverse Hessian; 0: no curvature is known
            "moves": torch.zeros(e, self.memory, d, device=device),  # s, oldest first
            "turns": torch.zeros(e, self.memory, d, device=device),  # y
            "weights": torch.zeros(e, self.memory, 1, device=device),  # 1 / sᵀy; 0: no pair yet
        }

    def step(self, losses: Tensor, gradients: Tensor, clamp: Clamp) -> Tensor:
        state = self.state
        moves, turns = self.points - self.found, gradients - state["gradients"]  # s, y
        slope = (moves * state["gradients"]).sum(1)  # what the loss would change by, were it straight
        taken = (losses <= self.losses + 1e-4 * slope) & (losses < self.losses)
        # Where the parabola through both losses is lowest; nan where a loss is not finite.
        shrink = (-slope / (2 * (losses - self.losses - slope))).nan_to_num(0.1).clamp(0.1, 0.5)
        self._remember(moves, turns, where=taken & self.losses.isfinite())
        state["found"] = torch.where(taken[:, None], self.points, self.found)
        state["gradients"] = torch.where(taken[:, None], gradients, state["gradients"])
        state["losses"] = torch.where(taken, losses, self.losses)
        state["length"] = torch.where(taken[:, None], 1.0, state["length"] * shrink[:, None])
        state["misses"] = torch.where(taken, 0, state["misses"] + 1)
        self._forget(state["misses"] >= self.tries)
        state["points"] = clamp(self.found - state["length"] * self._direction())
        return taken

    def _remember(self, moves: Tensor, turns: Tensor, *, where: Tensor) -> None:
        curvature, square = (moves * turns).sum(1, keepdim=True), turns.square().sum(1, keepdim=True)  # (e, 1)
        convex = where[:, None] & (curvature > 1e-10 * square)
        state = self.state
        state["scale"] = torch.where(convex, curvature / square, state["scale"])
        for name, newest in (("moves", moves), ("turns", turns), ("weights", 1 / curvature)):
            rolled = torch.cat([state[name][:, 1:], newest[:, None]], 1)
            state[name] = torch.where(convex[:, :, None], rolled, state[name])

    def _forget(self, stuck: Tensor) -> None:
        state = self.state
        state["converged"] = self.converged | (stuck & (state["scale"][:, 0] == 0))
        for name, fresh in (("scale", 0.0), ("length", 1.0)):
            state[name] = torch.where(stuck[:, None], fresh, state[name])
        state["weights"] = torch.where(stuck[:, None, None], 0.0, state["weights"])
        state["misses"] = torch.where(stuck, 0, state["misses"])

    def _direction(self) -> Tensor:
        """The inverse Hessian times the gradient (e, d), by the two-loop recursion."""
        state, direction = self.state, self.state["gradients"]
        pairs = [(state["moves"][:, i], state["turns"][:, i], state["weights"][:, i]) for i in range(self.memory)]
        shares = []
        for s, y, weight in reversed(pairs):
            shares.append(weight * (s * direction).sum(1, keepdim=True))
            direction = direction - shares[-1] * y
        first = state["radius"] * torch.nn.functional.normalize(direction, dim=1, eps=1e-30)
        direction = torch.where(state["scale"] > 0, state["scale"] * direction, first)
        for (s, y, weight), share in zip(pairs, reversed(shares), strict=True):
            direction = direction + (share - weight * (y * direction).sum(1, keepdim=True)) * s
        return direction
