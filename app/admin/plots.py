"""Compute the points of curves for an SVG, which a template draws without a script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 200
LEFT, RIGHT, TOP, BOTTOM = 104, 12, 12, 28
DECADES = 2
"""A curve over more decades than this has a logarithmic axis."""


@dataclass(frozen=True)
class Tick:
    position: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A curve of one value per step, in a box of `WIDTH` by `HEIGHT`."""

    title: str
    points: str
    logarithmic: bool
    first: float
    last: float
    steps: int
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]


def curve(title: str, values: Sequence[float]) -> Curve | None:
    """Return the curve of `values`, or None if there are no values or only zeros."""
    if not any(values):
        return None
    low, high = min(values), max(values)
    logarithmic = low > 0 and math.log10(high / low) > DECADES
    scaled = [math.log10(value) for value in values] if logarithmic else list(values)
    bottom, top = min(scaled), max(scaled)
    if bottom == top:
        bottom, top = bottom - abs(bottom) / 10, top + abs(top) / 10
    if bottom == top:  # a logarithm of 0
        bottom, top = bottom - 1, top + 1

    def x(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, len(values) - 1), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - bottom) / (top - bottom), 1)

    marks = [bottom + (top - bottom) * share for share in (0, 0.5, 1)]
    return Curve(
        title=title,
        points=" ".join(f"{x(step)},{y(value)}" for step, value in enumerate(scaled)),
        logarithmic=logarithmic,
        first=values[0],
        last=values[-1],
        steps=len(values),
        x_ticks=[Tick(x(step), str(step + 1)) for step in sorted({0, (len(values) - 1) // 2, len(values) - 1})],
        y_ticks=[Tick(y(mark), f"{10**mark if logarithmic else mark:.3g}") for mark in marks],
    )
