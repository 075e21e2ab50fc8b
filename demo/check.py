"""Hold a demo's report against what the demo promises: `python -m demo.check out/demo/report.json`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

DESTINATION_RISE = 0.70  # mean confidence of the destination on source prompts, after minus before
ERASED_FALL = 0.50  # mean confidence of an erased style
HOLDOUT_FALL = 0.05  # mean confidence of concepts that no edit names
EDITS = 12


@dataclass(frozen=True)
class Figures:
    """What a report comes to: mean confidences, after minus before."""

    replaced: int
    erased: int
    destinations: float
    """of the destinations on prompts that name the sources; 0 where nothing was replaced"""
    erasure: float
    """of the erased styles"""
    holdout: float

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Figures":
        replaced = [edit for edit in report["edits"] if edit["destination"] is not None]
        erased = [edit for edit in report["edits"] if edit["destination"] is None]
        return cls(
            replaced=len(replaced),
            erased=len(erased),
            destinations=_mean_change(replaced, "destination"),
            erasure=_mean_change(erased, "source"),
            holdout=report["holdout"]["after"] - report["holdout"]["before"],
        )


def _mean_change(edits: Sequence[Mapping[str, Any]], what: str) -> float:
    return mean(edit["after"][what] - edit["before"][what] for edit in edits) if edits else 0.0


def failures(report: Mapping[str, Any]) -> dict[str, str]:
    """Describe what the report does not show: a sentence for each promise that is broken, by its name."""
    figures, found = Figures.of(report), {}
    if figures.replaced + figures.erased < EDITS or not figures.replaced or not figures.erased:
        found["edits"] = (
            f"{figures.replaced} replacements and {figures.erased} erasures; at least {EDITS} edits of both kinds"
        )
    if figures.destinations < DESTINATION_RISE:
        found["destinations"] = (
            f"the destinations' confidence rose by {figures.destinations:.3f}, less than {DESTINATION_RISE}"
        )
    if -figures.erasure < ERASED_FALL:
        found["erasure"] = f"the erased style's confidence fell by {-figures.erasure:.3f}, less than {ERASED_FALL}"
    if -figures.holdout > HOLDOUT_FALL:
        found["holdout"] = f"the held-out concepts' confidence fell by {-figures.holdout:.3f}, more than {HOLDOUT_FALL}"
    if report["pulled"]["sha256"] != report["checkpoint"]["sha256"]:
        found["pull"] = "the pulled file is not the published one"
    return found


def main(arguments: Sequence[str]) -> int:
    """0 when every promise is kept, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m demo.check", description=__doc__)
    parser.add_argument("report", type=Path)
    broken = failures(json.loads(parser.parse_args(arguments).report.read_text(encoding="utf-8")))
    lines = [f"BROKEN: {sentence}" for sentence in broken.values()] or ["the demo shows what it promises"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
