"""The environment of the templates and its filters. Autoescape is on: text of clients is never markup."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import editing
from app.admin import plots
from app.jobs import kinds


def format_time(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def age(time: datetime) -> str:
    """Return how long ago a time was, in a suitable unit."""
    seconds = max(0, round((datetime.now(UTC) - time) / timedelta(seconds=1)))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def confidence(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def size(count: int) -> str:
    """Return a number of bytes in a suitable unit."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters.update({filter.__name__: filter for filter in (format_time, age, figure, confidence, size, pretty)})
TEMPLATES.tests["png"] = lambda name: name.endswith(".png")
TEMPLATES.globals.update(kinds=kinds, plots=plots, version=editing.__version__)
