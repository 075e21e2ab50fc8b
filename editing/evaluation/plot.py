"""How edits scale, as a picture."""

import io
from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from editing.evaluation.iceb import Scores


def plot_scales(scales: Mapping[int, Scores], *, title: str) -> bytes:
    """S2D on free prompts and HD against the number of edits, as PNG. The same scores give the same bytes."""
    counts = sorted(scales)
    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, marker in (("s2d", "S2D: edits that reach their destination", "o"), ("hd", "HD: others", "s")):
        values = [getattr(scales[count], name) for count in counts]
        points = [(count, value) for count, value in zip(counts, values, strict=True) if value is not None]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker=marker, label=label)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(counts, minor=False)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel("edits")
    axes.set_ylabel("change of confidence")
    axes.set_title(title)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
