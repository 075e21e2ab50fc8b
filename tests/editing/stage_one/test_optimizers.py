"""The optimizers on functions with known minima; rows do not affect each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from editing.stage_one.optimizers import LBFGS, Adam, RowOptimizer

STEEP = torch.tensor([1.0, 30.0, 4.0])
GOALS = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0], [2.0, 2.0, 2.0]])  # (e, d)
MAKES: list[Callable[[], RowOptimizer]] = [Adam, LBFGS]


def evaluate(points: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses (e,) and gradients (e, d) of a quadratic with different curvatures."""
    difference = points - goals
    return (STEEP * difference.square()).sum(1), 2 * STEEP * difference


def keep_length(deltas: Tensor) -> Tensor:
    return deltas


def join(optimizer: RowOptimizer, rows: int) -> None:
    optimizer.join(torch.zeros(rows, 3), learning_rate=torch.full((rows,), 0.1), initial_step=torch.ones(rows))


def test_adam_equals_torchs() -> None:
    ours = Adam()
    join(ours, 1)
    theirs = torch.nn.Parameter(torch.zeros(3))
    reference = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(30):
        ours.step(*evaluate(ours.points, GOALS[:1]), keep_length)
        reference.zero_grad()
        evaluate(theirs[None], GOALS[:1])[0].sum().backward()
        reference.step()
    torch.testing.assert_close(ours.best[0], theirs.detach(), rtol=1e-4, atol=1e-4)


class TestLBFGS:
    def test_finds_the_minimum_in_few_steps(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        for _ in range(25):
            optimizer.step(*evaluate(optimizer.points, GOALS), keep_length)
        torch.testing.assert_close(optimizer.best, GOALS, rtol=1e-3, atol=1e-3)

    def test_never_accepts_a_worse_point(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        last = optimizer.losses
        rejections = 0
        for _ in range(25):
            losses, gradients = evaluate(optimizer.points, GOALS)
            accepted = optimizer.step(losses, gradients, keep_length)
            assert (optimizer.losses <= last).all()
            assert torch.equal(optimizer.losses[accepted], losses[accepted])
            torch.testing.assert_close(evaluate(optimizer.best, GOALS)[0], optimizer.losses)
            rejections += int((~accepted).sum())
            last = optimizer.losses
        assert rejections > 0

    def test_finds_the_minimum_within_a_norm_limit(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        for _ in range(40):
            optimizer.step(
                *evaluate(optimizer.points, GOALS),
                lambda deltas: deltas * (1 / deltas.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1),
            )
        assert (optimizer.best.norm(dim=1) <= 1 + 1e-6).all()
        grid = torch.nn.functional.normalize(torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
        best = (STEEP * (grid - GOALS[0]).square()).sum(1).min()
        assert float(optimizer.losses[0]) == pytest.approx(float(best), rel=0.05)

    def test_reports_convergence(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        for _ in range(60):
            optimizer.step(*evaluate(optimizer.points, GOALS), keep_length)
        assert optimizer.converged.all()

    def test_rejects_a_loss_that_is_not_finite(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 1)
        optimizer.step(*evaluate(optimizer.points, GOALS[:1]), keep_length)
        far = optimizer.points
        nan = torch.full((1,), torch.nan)
        assert not optimizer.step(nan, nan[:, None].expand(1, 3), keep_length).any()
        assert far.norm() > optimizer.points.norm() > 0
        for _ in range(25):
            optimizer.step(*evaluate(optimizer.points, GOALS[:1]), keep_length)
        torch.testing.assert_close(optimizer.best, GOALS[:1], rtol=1e-3, atol=1e-3)

    def test_row_without_a_finite_loss_stays_at_its_start(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 1)
        nan = torch.full((1,), torch.nan)
        optimizer.step(nan, nan[:, None].expand(1, 3), keep_length)
        assert not optimizer.losses.isfinite().any()
        assert torch.equal(optimizer.best, torch.zeros(1, 3))


@pytest.mark.parametrize("make", MAKES)
def test_rows_do_not_affect_each_other(make: Callable[[], RowOptimizer]) -> None:
    """Row 0 leaves after four steps and row 2 joins: rows 1 and 2 move as they do alone."""
    alone = {}
    for row in (1, 2):
        optimizer = make()
        join(optimizer, 1)
        for _ in range(12 if row == 1 else 8):
            optimizer.step(*evaluate(optimizer.points, GOALS[row : row + 1]), keep_length)
        alone[row] = optimizer.best[0]

    together = make()
    join(together, 2)
    for _ in range(4):
        together.step(*evaluate(together.points, GOALS[:2]), keep_length)
    together.keep([1])
    join(together, 1)
    for _ in range(8):
        together.step(*evaluate(together.points, GOALS[1:]), keep_length)
    torch.testing.assert_close(together.best, torch.stack([alone[1], alone[2]]))
