from typing import Any

import pytest

from app.admin.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve


def points(drawn: Any) -> Any:
    return [tuple(map(float, point.split(","))) for point in drawn.points.split()]


def test_fills_its_box() -> None:
    drawn = curve("loss", [4.0, 3.0, 1.0, 2.0])
    assert drawn is not None
    assert [x for x, _ in points(drawn)][::3] == [LEFT, WIDTH - RIGHT]
    assert [y for _, y in points(drawn)] == pytest.approx([TOP, TOP + 160 / 3, HEIGHT - BOTTOM, TOP + 320 / 3], abs=0.1)
    assert [tick.label for tick in drawn.y_ticks] == ["1", "2.5", "4"]
    assert [tick.label for tick in drawn.x_ticks] == ["1", "2", "4"]
    assert (drawn.first, drawn.last, drawn.steps) == (4.0, 2.0, 4)


def test_over_decades_it_is_logarithmic() -> None:
    drawn = curve("loss", [1000.0, 10.0, 0.1])
    assert drawn is not None
    assert drawn.logarithmic
    heights = [y for _, y in points(drawn)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert [tick.label for tick in drawn.y_ticks] == ["0.1", "10", "1e+03"]
    with_zero = curve("loss", [1000.0, 0.0])
    assert with_zero is not None and not with_zero.logarithmic


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [-1.0, -1.0], [1e300, 1e-300], [0.0, 1e-9]])
def test_odd_curves_stay_inside(values: Any) -> None:
    for x, y in points(curve("loss", values)):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_nothing_to_see(values: Any) -> None:
    assert curve("loss", values) is None
