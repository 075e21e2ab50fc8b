"""Write `report.md`, the report of an evaluation as tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.checkpoints.markdown import render_markdown
from emender.schemas.text import escape_markdown

SCORES = {
    "sf": "SF: the class of the source fades",
    "s2d_template": "S2D, templates: the source becomes the destination",
    "s2d": "S2D, other prompts",
    "hd": "HD: concepts that no edit names",
    "f1": "F1: mean of S2D on other prompts and HD",
}


def write_report(report: Mapping[str, Any], *, title: str) -> bytes:
    """Return the report of `GET …/evaluations/{id}` as Markdown."""
    text = render_markdown(
        Path(__file__).with_name("report.md.jinja"),
        title=title,
        report=report,
        scores=SCORES,
        means=report["confidences"],
        number=lambda value: "–" if value is None else f"{value:.3f}",
        signed=lambda value: "–" if value is None else f"{value:+.3f}",
        setting=_setting,
    )
    return text.encode()


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{escape_markdown(str(key))} {escape_markdown(str(item))}" for key, item in value.items())
    return ", ".join(escape_markdown(str(item)) for item in (value if isinstance(value, list) else [value]))
