"""A mean over a few runs, and how far the true one may lie from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Interval:
    mean: float
    ci95: float | None
    """Half the width of the 95 % confidence interval by Student's t; None for one run, which says nothing of it."""

    @classmethod
    def of(cls, runs: Sequence[float]) -> "Interval":
        """Of at least one run."""
        if len(runs) < 2:
            return cls(mean(runs), None)
        return cls(mean(runs), t_quantile(len(runs) - 1) * stdev(runs) / math.sqrt(len(runs)))


def t_quantile(freedom: int, *, share: float = 0.95) -> float:
    """t with `share` of Student's distribution between -t and t, for a whole number of degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # to the last bits of an angle
        angle = (low + high) / 2
        low, high = (angle, high) if _share_within(angle, freedom) < share else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def _share_within(angle: float, freedom: int) -> float:
    """The share between -t and t with t = √ν tan(angle): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for step in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
