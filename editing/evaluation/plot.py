"""Plot scores against the number of edits."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from editing.evaluation.iceb import Scores


def plot_scales(scales: Mapping[int, Scores], *, title: str) -> bytes:
    """Plot S2D on free prompts and HD against the number of edits, as PNG. Equal scores give equal bytes."""
    counts = sorted(scales)
    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, marker in (
        ("s2d", "S2D: edits that reach their destination", "o"),
        ("hd", "HD: held-out concepts", "s"),
    ):
        values = [getattr(scales[count], name) for count in counts]
        points = [(count, value) for count, value in zip(counts, values, strict=True) if value is not None]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker=marker, label=label)
    _format_edits_axis(axes, counts)
    axes.set_ylabel("change of confidence")
    axes.set_title(title)
    axes.legend()
    return _write_png(figure)


def plot_methods(reports: Sequence[Mapping[str, Any]], *, methods: Iterable[str] | None = None) -> bytes:
    """Plot S2D on free prompts and HD of several methods against the number of edits, with intervals, as PNG.

    `reports` are those of `editing.evaluation.report.build_report` for one task and model, each with another number of
    edits. `methods` defaults to all but the base, whose scores are 0. Equal reports give equal bytes.
    """
    reports = sorted(reports, key=lambda report: report["edits"])
    counts = [report["edits"] for report in reports]
    known = dict.fromkeys(method for report in reports for method in report["methods"] if method != "base")
    figure = Figure(figsize=(9.6, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, score, label in zip(panels, ("s2d", "hd"), ("S2D, free prompts", "HD, held-out concepts"), strict=True):
        for number, method in enumerate(known if methods is None else methods):
            measured = [report["methods"].get(method, {}).get(score) for report in reports]
            points = [(count, own) for count, own in zip(counts, measured, strict=True) if own is not None]
            axes.errorbar(
                [count for count, _ in points],
                [own["mean"] for _, own in points],
                yerr=[own["ci95"] or 0.0 for _, own in points],
                marker="osD^vP*X"[number % 8],
                markersize=4,
                capsize=3,
                label=method,
            )
        _format_edits_axis(axes, counts)
        axes.set_title(label)
    panels[0].set_ylabel("change of confidence")
    panels[0].legend(fontsize="small")
    return _write_png(figure)


def _format_edits_axis(axes: Axes, counts: Sequence[int]) -> None:
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(counts, minor=False)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel("edits")


def _write_png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
