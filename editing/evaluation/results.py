"""Figures of a benchmark as they are reported: rows of means, with what they were measured with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from editing.evaluation.intervals import Interval
from editing.evaluation.rows import Oddity

LIMITS = (
    "Corrections of a text encoder do not stop prompts that ask for unsafe pictures (NSFW), and a description that "
    "avoids the edited words may still draw an erased concept."
)
"""The paper, appendix I: part of every report."""


@dataclass(frozen=True)
class Results:
    """What a benchmark says of several models, each a row by its name: "base", "destination", "edited"."""

    benchmark: str
    rows: Mapping[str, Mapping[str, Interval]]
    settings: Mapping[str, Any]
    """What makes the figures again: seeds, steps, guidance, digests, versions, how many tasks; and the cost."""
    oddities: Sequence[Oddity] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Figures of single tasks, where the benchmark has them."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "limits": LIMITS}

    def as_table(self) -> Table:
        """A line for each row; a figure that a row does not have is a dash."""
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        table = Table(title=self.benchmark)
        table.add_column("model", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for title, row in self.rows.items():
            table.add_row(title, *(_cell(row.get(name)) for name in names))
        return table


def _cell(figure: Interval | None) -> str:
    if figure is None:
        return "–"
    digits = 2 if abs(figure.mean) >= 10 else 3
    half = "" if figure.ci95 is None else f" ± {figure.ci95:.{digits}f}"
    return f"{figure.mean:.{digits}f}{half}"
