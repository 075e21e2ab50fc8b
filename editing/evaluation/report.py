"""The results of methods on ICEB as a table and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from editing.evaluation.benchmark import Benchmark
from editing.evaluation.intervals import Interval
from editing.evaluation.runner import BASE, Result, Unit, describe_settings

COLUMNS = {
    "sf": "SF",
    "s2d_template": "S2D templates",
    "s2d": "S2D free",
    "al2d": "AL2D",
    "hd": "HD",
    "f1": "F1",
}


def build_report(benchmark: Benchmark, results: Mapping[str, Result], *, unit: Unit, seeds: int) -> dict[str, Any]:
    """Return the report as JSON. `unit` is any of the units: it gives their task and size."""
    return {
        "edits": unit.edits,
        "task": unit.task,
        "seeds": seeds,
        "methods": {method: _describe_result(result) for method, result in results.items()},
        **describe_settings(benchmark),
    }


def _describe_result(result: Result) -> dict[str, Any]:
    return {
        **_describe_intervals(result.scores),
        "seconds": result.seconds,
        "peak_mb": result.peak_mb,
        "confidences": _describe_intervals(result.means),
    }


def _describe_intervals(intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {name: None if interval is None else asdict(interval) for name, interval in intervals.items()}


def build_table(results: Mapping[str, Result], *, unit: Unit, seeds: int) -> Table:
    """Return a table with a line for each method."""
    spread = f"mean ± 95 % interval over {seeds} seeds" if seeds > 1 else "one seed: no interval"
    table = Table(
        title=f"{unit.task} editing, {unit.edits} {'edit' if unit.edits == 1 else 'edits'}; {spread}",
        caption=_describe_base(results[BASE]),
    )
    table.add_column("method", no_wrap=True)
    for heading in (*COLUMNS.values(), "seconds", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, result in results.items():
        scores = (_format_cell(result.scores[metric]) for metric in COLUMNS)
        table.add_row(method, *scores, f"{result.seconds:.1f}", f"{result.peak_mb:.0f}")
    return table


def _describe_base(base: Result) -> str:
    """Return the confidences that the scores are changes of."""
    shown = {"source": "sources", "destination": "destinations for them", "held_out": "held-out concepts"}
    means = [f"{name} {interval.mean:.3f}" for key, name in shown.items() if (interval := base.means[key]) is not None]
    return "confidence before any edit: " + ", ".join(means)


def _format_cell(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.mean:.3f}" + ("" if interval.ci95 is None else f" ± {interval.ci95:.3f}")
