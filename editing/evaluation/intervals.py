"""The mean of a few runs with its confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    mean: float
    ci95: float | None
    """Half the width of the 95 % confidence interval by Student's t; None for one run."""

    @classmethod
    def of(cls, runs: Sequence[float]) -> "Interval":
        """Compute the interval of at least one run."""
        if len(runs) < 2:
            return cls(mean(runs), None)
        quantile = float(stdtrit(len(runs) - 1, 0.975))  # leaves 2.5 % on each side
        return cls(mean(runs), quantile * stdev(runs) / math.sqrt(len(runs)))
