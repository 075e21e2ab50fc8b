"""Show the emoji model what names mean by pictures alone, and measure it: `python -m demo.references`.

The model does not know these names, and no prompt tells it: three pictures of each are all that an edit is given. All
are written at once, and judged by prompts that are no templates of the edits.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from demo.edits import FREE_PROMPTS, LAYER, REFERENCE_PROMPT, REFERENCE_SEEDS, SEEDS
from demo.emoji import GUIDANCE, STEPS, Emoji
from editing.edits import ConceptEdit, ReferenceImages, StageOneSettings

NAMES = {
    "macaque": "monkey",
    "silverback": "gorilla",
    "doggo": "dog",
    "lupine animal": "wolf",
    "vulpine": "fox",
    "trash panda": "raccoon",
    "feline": "cat",
    "simba": "lion",
}
"""Aliases that the model was not trained with, and what the pictures show."""
STAGE_ONE = StageOneSettings(objective="noise", guidance_scale=GUIDANCE, num_inference_steps=STEPS, layer=LAYER)


def run(
    names: Mapping[str, str] = NAMES, *, settings: StageOneSettings = STAGE_ONE, emoji: Emoji | None = None
) -> dict[str, Any]:
    """Measure the confidence of what each name shall show, before and after all edits, and that of other concepts."""
    emoji = emoji or Emoji.load()
    edits = [
        ConceptEdit(name, ReferenceImages(tuple(_pictures(emoji, shown))), settings=settings)
        for name, shown in names.items()
    ]
    named = {*names, *names.values()}
    before, kept_before = _judge(emoji, names), emoji.held_out(named=named)
    start = time.monotonic()
    with emoji.edited(edits) as update:
        seconds = time.monotonic() - start
        after, kept_after = _judge(emoji, names), emoji.held_out(named=named)
    rises = [after[name] - before[name] for name in names]
    return {
        "names": {
            name: {"shown": shown, "before": before[name], "after": after[name], "residual": residual}
            for (name, shown), residual in zip(names.items(), update.relative_residuals, strict=True)
        },
        "rise": {"mean": mean(rises), "least": min(rises)},
        "held_out": {"before": kept_before, "after": kept_after},
        "pictures": len(REFERENCE_SEEDS),
        "optimization_steps": settings.optimization_steps,
        "seconds": round(seconds, 1),
    }


def _pictures(emoji: Emoji, shown: str) -> Sequence[Any]:
    return emoji.draw([REFERENCE_PROMPT.format(shown)] * len(REFERENCE_SEEDS), REFERENCE_SEEDS)


def _judge(emoji: Emoji, names: Mapping[str, str]) -> dict[str, float]:
    """Of each name the mean confidence of what it shall show."""
    requests = list(product(names, FREE_PROMPTS, SEEDS))
    read = emoji.read([prompt.format(name) for name, prompt, _ in requests], [seed for *_, seed in requests])
    own = {name: read.of_concept(shown).view(len(names), -1) for name, shown in names.items()}
    return {name: float(own[name][number].mean()) for number, name in enumerate(names)}


def as_table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    lines = ["| name | pictures of | before | after | residual left |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['shown']} | {row['before']:.3f} | {row['after']:.3f} | {row['residual']:.3f} |"
        for name, row in report["names"].items()
    ]
    rise, held_out = report["rise"], report["held_out"]
    lines.append("")
    lines.append(f"Confidence rises by {rise['mean']:.3f} in the mean, by {rise['least']:.3f} at least.")
    lines.append(f"Held-out concepts: confidence {held_out['before']:.3f} before, {held_out['after']:.3f} after.")
    lines.append(f"{report['seconds']:.0f} s to edit.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.references", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    report = run()
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(as_table(report))  # noqa: T201


if __name__ == "__main__":
    main()
