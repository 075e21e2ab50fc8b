"""Hold a demo's report against what the demo promises: `python -m demo.check out/demo/report.json`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

DESTINATION_RISE = 0.70  # mean confidence of the destination on source prompts, after minus before
ERASED_FALL = 0.50  # mean confidence of an erased style
HOLDOUT_FALL = 0.05  # mean confidence of concepts that no edit names
EDITS = 12


def failures(report: Mapping[str, Any]) -> list[str]:
    """What the report does not show, a sentence each; empty when every promise is kept."""
    edits: Sequence[Mapping[str, Any]] = report["edits"]
    replaced = [edit for edit in edits if edit["destination"] is not None]
    erased = [edit for edit in edits if edit["destination"] is None]
    found = []
    if len(edits) < EDITS or not replaced or not erased:
        found.append(f"{len(replaced)} replacements and {len(erased)} erasures; at least {EDITS} edits of both kinds")
    if replaced:
        rise = mean(edit["after"]["destination"] - edit["before"]["destination"] for edit in replaced)
        if rise < DESTINATION_RISE:
            found.append(f"the destinations' confidence rose by {rise:.3f}, less than {DESTINATION_RISE}")
    if erased:
        fall = mean(edit["before"]["source"] - edit["after"]["source"] for edit in erased)
        if fall < ERASED_FALL:
            found.append(f"the erased style's confidence fell by {fall:.3f}, less than {ERASED_FALL}")
    fall = report["holdout"]["before"] - report["holdout"]["after"]
    if fall > HOLDOUT_FALL:
        found.append(f"the held-out concepts' confidence fell by {fall:.3f}, more than {HOLDOUT_FALL}")
    if report["pulled"]["sha256"] != report["checkpoint"]["sha256"]:
        found.append("the pulled file is not the published one")
    return found


def main(arguments: Sequence[str]) -> int:
    """0 when every promise is kept, 1 with a line per broken one."""
    found = failures(json.loads(Path(arguments[0]).read_text()))
    sys.stdout.write("".join(f"{failure}\n" for failure in found) or "the demo shows what it promises\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
