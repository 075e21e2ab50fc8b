"""What was measured, as a table and as JSON."""

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


def as_json(benchmark: Benchmark, results: Mapping[str, Result], *, of: Unit, seeds: int) -> dict[str, Any]:
    """`of` is any unit of the results, for their task and size."""
    return {
        "edits": of.edits,
        "task": of.task,
        "seeds": seeds,
        "methods": {method: _method(result) for method, result in results.items()},
        **describe_settings(benchmark),
    }


def _method(result: Result) -> dict[str, Any]:
    return {
        **_intervals(result.scores),
        "seconds": result.seconds,
        "peak_mb": result.peak_mb,
        "confidences": _intervals(result.means),
    }


def _intervals(found: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {name: None if interval is None else asdict(interval) for name, interval in found.items()}


def as_table(results: Mapping[str, Result], *, of: Unit, seeds: int) -> Table:
    noise = f"mean ± 95 % interval over {seeds} seeds" if seeds > 1 else "one seed: no interval"
    table = Table(
        title=f"{of.task} editing, {of.edits} {'edit' if of.edits == 1 else 'edits'}; {noise}",
        caption=_unedited(results[BASE]),
    )
    table.add_column("method", no_wrap=True)
    for heading in (*COLUMNS.values(), "seconds", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, result in results.items():
        scores = (_cell(result.scores[metric]) for metric in COLUMNS)
        table.add_row(method, *scores, f"{result.seconds:.1f}", f"{result.peak_mb:.0f}")
    return table


def _unedited(base: Result) -> str:
    """What the scores are changes of."""
    shown = {"source": "sources", "destination": "destinations for them", "held_out": "held-out concepts"}
    told = [f"{name} {interval.mean:.3f}" for key, name in shown.items() if (interval := base.means[key]) is not None]
    return "confidence before any edit: " + ", ".join(told)


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.mean:.3f}" + ("" if interval.ci95 is None else f" ± {interval.ci95:.3f}")
