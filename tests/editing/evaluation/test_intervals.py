import pytest

from editing.evaluation.intervals import Interval


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_quantiles_match_the_printed_tables(freedom: int, quantile: float) -> None:
    runs = [-1.0, 1.0] + [0.0] * (freedom - 1)  # freedom + 1 runs, squares that sum to 2
    standard_error = (2 / freedom / (freedom + 1)) ** 0.5
    interval = Interval.of(runs)
    assert interval.ci95 is not None
    assert interval.ci95 / standard_error == pytest.approx(quantile, abs=5e-5)


def test_interval_of_three_runs() -> None:
    interval = Interval.of([0.1, 0.2, 0.6])  # standard deviation 0.264575
    assert interval.mean == pytest.approx(0.3)
    assert interval.ci95 == pytest.approx(4.30265 * 0.264575 / 3**0.5, rel=1e-4)


def test_one_run_has_no_interval() -> None:
    assert Interval.of([0.5]) == Interval(0.5, None)
