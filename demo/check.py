"""Hold a demo's report against what the demo promises: `python -m demo.check out/demo/report.json`.

`--not-yet NAME` names a promise that is known not to be kept yet. Once it is kept, the check fails until that is taken
away: a known shortfall cannot stay on the list unnoticed.
"""

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


PROMISES = ("edits", "destinations", "erasure", "holdout", "pull")


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
    """What the report does not show: a sentence for each of `PROMISES` that is broken."""
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


def verdict(report: Mapping[str, Any], *, not_yet: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the report is as expected, and a line for everything that is worth saying."""
    broken = failures(report)
    lines = [f"{'not yet' if name in not_yet else 'BROKEN'}: {sentence}" for name, sentence in broken.items()]
    kept = [name for name in not_yet if name not in broken]
    lines += [f"KEPT NOW: take `--not-yet {name}` away" for name in kept]
    return not kept and set(broken) <= set(not_yet), lines or ["the demo shows what it promises"]


def main(arguments: Sequence[str]) -> int:
    """0 when the report is as expected, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m demo.check", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--not-yet", action="append", default=[], choices=PROMISES, help="a promise not kept yet")
    given = parser.parse_args(arguments)
    expected, lines = verdict(json.loads(given.report.read_text()), not_yet=given.not_yet)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if expected else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
