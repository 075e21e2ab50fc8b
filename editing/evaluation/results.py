"""The report of a benchmark: rows of means with their settings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from editing.evaluation.intervals import Interval
from editing.evaluation.rows import Note

LIMITS = (
    "Edits of a text encoder do not stop prompts for unsafe pictures (NSFW). A description that avoids the edited "
    "words may still draw an erased concept."
)
"""From the paper, appendix I. Part of every report."""


@dataclass(frozen=True)
class Results:
    """The results of several models, each a row by its name: "base", "destination", "edited"."""

    benchmark: str
    rows: Mapping[str, Mapping[str, Interval]]
    settings: Mapping[str, Any]
    """What reproduces the figures: seeds, steps, guidance, digests, versions, number of tasks; and the cost."""
    notes: Sequence[Note] = ()
    """About the benchmark's file."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Figures of single tasks, if the benchmark has them."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "limits": LIMITS}

    def build_table(self) -> Table:
        """Return a table with a line for each row and a dash for a missing figure."""
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        table = Table(title=self.benchmark)
        table.add_column("model", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for title, row in self.rows.items():
            table.add_row(title, *(_format_cell(row.get(name)) for name in names))
        return table


def _format_cell(figure: Interval | None) -> str:
    if figure is None:
        return "–"
    digits = 2 if abs(figure.mean) >= 10 else 3
    half = "" if figure.ci95 is None else f" ± {figure.ci95:.{digits}f}"
    return f"{figure.mean:.{digits}f}{half}"
