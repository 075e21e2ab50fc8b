"""`report.md`: what an evaluation found, for people."""

from collections.abc import Mapping
from typing import Any

from emender.schemas.text import escape_markdown as cell

LIMITS = """\
A classifier judged these pictures, and it errs. Only the classes that it knows can be held out. Correcting a text
encoder is no safety filter: it does not stop prompts that ask for unsafe pictures.
"""
SCORES = {
    "sf": "SF: the source's own class fades",
    "s2d_template": "S2D, templates: it becomes the destination",
    "s2d": "S2D, other prompts",
    "hd": "HD: concepts that no edit names",
    "f1": "F1: the mean of S2D on other prompts and HD",
}


def as_markdown(report: Mapping[str, Any], *, title: str) -> str:
    """The report as `GET …/evaluations/{id}` gives it, as tables."""
    means = report["confidences"]
    lines = [f"# {cell(title)}", "", "| change of confidence | |", "|---|---|"]
    lines += [f"| {name} | {_number(report['scores'][key], sign=True)} |" for key, name in SCORES.items()]
    lines += ["", "| mean confidence | base | edited | destination |", "|---|---|---|---|"]
    for key, name in (("destination", "destination, other prompts"), ("held_out", "held-out concepts")):
        figures = (_number(means[row][key]) for row in ("base", "edited", "destination"))
        lines.append(f"| {name} | {' | '.join(figures)} |")
    lines += ["", "The destination column is the base model, prompted with the destination itself.", ""]
    if report["scales"]:
        lines += ["| edits | S2D | HD | F1 |", "|---|---|---|---|"]
        for row in report["scales"]:
            cells = (_number(row[key], sign=True) for key in ("s2d", "hd", "f1"))
            lines.append(f"| {row['edits']} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "| source | destination | before | after | destination score | relative residual | succeeded |",
        "|---|---|---|---|---|---|---|",
    ]
    for edit in report["edits"]:
        figures = (_number(edit[key]) for key in ("before", "after", "destination_score", "relative_residual"))
        goal = cell(edit["destination"]) if edit["destination"] else "(erased)"
        succeeded = "yes" if edit["succeeded"] else "**no**"
        lines.append(f"| {cell(edit['source'])} | {goal} | {' | '.join(figures)} | {succeeded} |")
    lines += [
        f"| {cell(edit['source'])} | | | | | | not evaluated: {cell(edit['reason'])} |"
        for edit in report["not_evaluated"]
    ]
    lines += ["", f"Held out: {', '.join(map(cell, report['held_out'])) or 'none'}.", "", LIMITS, "## Settings", ""]
    lines += [f"- {name}: {_setting(value)}" for name, value in report["settings"].items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{cell(str(key))} {cell(str(item))}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(cell(str(item)) for item in value)
    return cell(str(value))
