"""Erase one of the emoji model's styles, and measure it and the others: `python -m demo.erasure twemoji`.

A style is judged by the classifier's head for styles, on pictures whose prompts name it: the mean confidence of that
style. It stands in for the CLIP score of published figures: no image encoder was trained together with this model.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from demo.captions import ANY_STYLE
from demo.concepts import DRAWN_STYLES, read_concepts
from demo.edits import STYLE_TEMPLATES, TEXT
from demo.emoji import Emoji
from editing.edits import ConceptEdit, Erasure, StageOneSettings

STYLED_PROMPTS = ("a {} in the style of {style}", "{style} style {}", "a picture of a {}, {style} style")
CONCEPTS = 60


def run(style: str, *, concepts: int = CONCEPTS, emoji: Emoji | None = None) -> dict[str, Any]:
    """Measure the confidence of every style where it is named, before and after one is erased, and that of the concepts
    drawn in them."""
    emoji = emoji or Emoji.load()
    edit = ConceptEdit(style, Erasure(ANY_STYLE), templates=STYLE_TEMPLATES, settings=StageOneSettings(**TEXT))
    before = _judge(emoji, concepts), emoji.held_out(named=())
    with emoji.edited([edit]) as update:
        after = _judge(emoji, concepts), emoji.held_out(named=())
    styles = {
        name: {
            "before": before[0][name],
            "after": after[0][name],
            "change": after[0][name] / before[0][name] - 1,
        }
        for name in DRAWN_STYLES
    }
    return {
        "erased": style,
        "styles": styles,
        "held_out_styles": max(abs(row["change"]) for name, row in styles.items() if name != style),
        "held_out": {"before": before[1], "after": after[1]},
        "residual": update.relative_residuals[0],
        "pictures": concepts * len(STYLED_PROMPTS),
    }


def _judge(emoji: Emoji, concepts: int) -> dict[str, float]:
    """Of each style its mean confidence on pictures of concepts, evenly over the list, for which it is named."""
    names = [concept.name for concept in read_concepts() if concept.skew is None]
    chosen = [names[number * len(names) // concepts] for number in range(concepts)]
    confidences = {}
    for style in DRAWN_STYLES:
        requests = list(product(chosen, STYLED_PROMPTS))
        read = emoji.read([prompt.format(name, style=style) for name, prompt in requests], range(len(requests)))
        confidences[style] = float(read.of_style(style).mean())
    return confidences


def as_table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    lines = ["| style that is named | before | after | change |", "|---|---|---|---|"]
    lines += [
        f"| {name}{', erased' if name == report['erased'] else ''} | {row['before']:.3f} | {row['after']:.3f} "
        f"| {row['change']:+.1%} |"
        for name, row in report["styles"].items()
    ]
    held_out = report["held_out"]
    lines.append("")
    lines.append(f"Held-out concepts: confidence {held_out['before']:.3f} before, {held_out['after']:.3f} after.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.erasure", description=__doc__.splitlines()[0])
    parser.add_argument("style", choices=DRAWN_STYLES)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    report = run(given.style)
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(as_table(report))  # noqa: T201


if __name__ == "__main__":
    main()
