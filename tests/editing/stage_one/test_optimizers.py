"""The optimisers on functions whose minima are known, and that rows do not feel each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from editing.stage_one.optimizers import LBFGS, Adam, RowOptimizer

STEEP = torch.tensor([1.0, 30.0, 4.0])
GOALS = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0], [2.0, 2.0, 2.0]])  # (e, d)
MAKES: list[Callable[[], RowOptimizer]] = [Adam, LBFGS]


def bowl(points: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (e,) and gradients (e, d) of a quadratic that is steeper one way than another."""
    apart = points - goals
    return (STEEP * apart.square()).sum(1), 2 * STEEP * apart


def free(deltas: Tensor) -> Tensor:
    return deltas


def join(optimizer: RowOptimizer, rows: int) -> None:
    optimizer.join(torch.zeros(rows, 3), learning_rate=torch.full((rows,), 0.1), radius=torch.ones(rows))


def test_adam_steps_as_torchs() -> None:
    ours = Adam()
    join(ours, 1)
    theirs = torch.nn.Parameter(torch.zeros(3))
    reference = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(30):
        ours.step(*bowl(ours.points, GOALS[:1]), free)
        reference.zero_grad()
        bowl(theirs[None], GOALS[:1])[0].sum().backward()
        reference.step()
    torch.testing.assert_close(ours.found[0], theirs.detach(), rtol=1e-4, atol=1e-4)


class TestLBFGS:
    def test_finds_the_minimum_in_few_steps(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        for _ in range(25):
            optimizer.step(*bowl(optimizer.points, GOALS), free)
        torch.testing.assert_close(optimizer.found, GOALS, rtol=1e-3, atol=1e-3)

    def test_never_takes_a_worse_point(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        last = optimizer.losses
        misses = 0
        for _ in range(25):
            losses, gradients = bowl(optimizer.points, GOALS)
            taken = optimizer.step(losses, gradients, free)
            assert (optimizer.losses <= last).all()
            assert torch.equal(optimizer.losses[taken], losses[taken])
            torch.testing.assert_close(bowl(optimizer.found, GOALS)[0], optimizer.losses)
            misses += int((~taken).sum())
            last = optimizer.losses
        assert misses > 0

    def test_stays_within_the_clamp(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        for _ in range(40):
            optimizer.step(
                *bowl(optimizer.points, GOALS),
                lambda deltas: deltas * (1 / deltas.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1),
            )
        assert (optimizer.found.norm(dim=1) <= 1 + 1e-6).all()
        grid = torch.nn.functional.normalize(torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
        best = (STEEP * (grid - GOALS[0]).square()).sum(1).min()
        assert float(optimizer.losses[0]) == pytest.approx(float(best), rel=0.05)

    def test_says_where_it_can_do_no_better(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 3)
        for _ in range(60):
            optimizer.step(*bowl(optimizer.points, GOALS), free)
        assert optimizer.converged.all()

    def test_passes_over_a_loss_that_is_not_finite(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 1)
        optimizer.step(*bowl(optimizer.points, GOALS[:1]), free)
        far = optimizer.points
        nan = torch.full((1,), torch.nan)
        assert not optimizer.step(nan, nan[:, None].expand(1, 3), free).any()
        assert far.norm() > optimizer.points.norm() > 0
        for _ in range(25):
            optimizer.step(*bowl(optimizer.points, GOALS[:1]), free)
        torch.testing.assert_close(optimizer.found, GOALS[:1], rtol=1e-3, atol=1e-3)

    def test_a_row_that_never_was_finite_has_no_loss(self) -> None:
        optimizer = LBFGS()
        join(optimizer, 1)
        nan = torch.full((1,), torch.nan)
        optimizer.step(nan, nan[:, None].expand(1, 3), free)
        assert not optimizer.losses.isfinite().any()
        assert torch.equal(optimizer.found, torch.zeros(1, 3))


@pytest.mark.parametrize("make", MAKES)
def test_rows_come_and_go_unfelt(make: Callable[[], RowOptimizer]) -> None:
    """Row 0 leaves after four steps and row 2 comes in its place: 1 and 2 move as they would have alone."""
    alone = {}
    for row in (1, 2):
        optimizer = make()
        join(optimizer, 1)
        for _ in range(12 if row == 1 else 8):
            optimizer.step(*bowl(optimizer.points, GOALS[row : row + 1]), free)
        alone[row] = optimizer.found[0]

    together = make()
    join(together, 2)
    for _ in range(4):
        together.step(*bowl(together.points, GOALS[:2]), free)
    together.keep([1])
    join(together, 1)
    for _ in range(8):
        together.step(*bowl(together.points, GOALS[1:]), free)
    torch.testing.assert_close(together.found, torch.stack([alone[1], alone[2]]))
