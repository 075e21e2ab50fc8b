import pytest

from editing.evaluation.intervals import Interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_quantiles_are_those_of_the_printed_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-5)


def test_of_three_runs() -> None:
    interval = Interval.of([0.1, 0.2, 0.6])  # standard deviation 0.264575
    assert interval.mean == pytest.approx(0.3)
    assert interval.ci95 == pytest.approx(4.30265 * 0.264575 / 3**0.5, rel=1e-4)


def test_one_run_has_no_interval() -> None:
    assert Interval.of([0.5]) == Interval(0.5, None)
