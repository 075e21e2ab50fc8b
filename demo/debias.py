"""Balance the genders of the emoji model's professions, and measure it: `python -m demo.debias doctor`.

The base model draws a profession's trained gender nearly always. Algorithm 1 mixes the values of "man doctor" and
"woman doctor" until both are drawn equally often; what comes of it is judged at other seeds than it was searched with.
Δ_p = |F_p - 50| / 50, F_p the percentage of women: 1 is one gender alone, 0 is balance.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import editing
from demo.concepts import GENDERS, read_concepts
from demo.emoji import GUIDANCE, STEPS, Emoji
from editing.debias.balancing import DebiasProgress, DebiasResult, DebiasSettings, debias, measure_shares
from editing.edits import Balance, ConceptEdit, StageOneSettings
from editing.evaluation.gender import compute_imbalance
from editing.stage_two.update import apply_temporarily, compute_update

TEMPLATES = ("a photo of a {}", "{}")
"""What is drawn of a profession; the first is no template of the edits."""
SEARCH = DebiasSettings(pictures=48, num_inference_steps=STEPS, guidance_scale=GUIDANCE, templates=TEMPLATES)
JUDGED = replace(SEARCH, seed=100_000)
STAGE_ONE = StageOneSettings(objective="text")


def professions() -> list[str]:
    """Return the concepts whose neutral captions were trained with more of one gender."""
    return [concept.name for concept in read_concepts() if concept.skew is not None]


def balanced(profession: str, *, settings: StageOneSettings = STAGE_ONE) -> ConceptEdit:
    """Return the edit that asks for both genders in equal shares."""
    return ConceptEdit(profession, Balance({f"{gender} {profession}": 0.5 for gender in GENDERS}), settings=settings)


def run(
    names: Sequence[str],
    *,
    search: DebiasSettings = SEARCH,
    judged: DebiasSettings = JUDGED,
    emoji: Emoji | None = None,
) -> dict[str, Any]:
    """Balance these professions together; Δ_p before and after, the rounds, and what became of the other concepts."""
    emoji = emoji or Emoji.load()
    moments = editing.FactoredMoments(emoji.moments, encoder=emoji.pipeline.encoder.name)
    edits = [balanced(name) for name in names]
    start = time.monotonic()
    values = emoji.values(edits)
    before, kept_before = _judge(emoji, edits, settings=judged), emoji.held_out(named=names)
    found = debias(emoji.pipeline, edits, values, [moments], emoji.classifier, settings=search, progress=_say)
    update = compute_update(emoji.pipeline.encoder, edits, [each.value for each in found], moments)
    with apply_temporarily(emoji.pipeline.encoder, update):
        after, kept_after = _judge(emoji, edits, settings=judged), emoji.held_out(named=names)
    return {
        "professions": {
            name: _figures(each, before[name], after[name]) for name, each in zip(names, found, strict=True)
        },
        "delta_p": {when: _mean_imbalance(seen, names) for when, seen in (("before", before), ("after", after))},
        "held_out": {"before": kept_before, "after": kept_after},
        "search": asdict(search),
        "judged": asdict(judged),
        "seconds": round(time.monotonic() - start, 1),
    }


def _judge(emoji: Emoji, edits: Sequence[ConceptEdit], *, settings: DebiasSettings) -> dict[str, float]:
    """Return the share of women in each profession's pictures."""
    shares = {edit.source: measure_shares(emoji.pipeline, edit, emoji.classifier, settings=settings) for edit in edits}
    return {name: share[f"woman {name}"] for name, share in shares.items()}


def _figures(found: DebiasResult, before: float, after: float) -> dict[str, Any]:
    return {
        "women": {"before": before, "after": after},
        "delta_p": {"before": compute_imbalance(before), "after": compute_imbalance(after)},
        "factors": dict(found.factors),
        "rounds": [asdict(each) for each in found.rounds],
        "chosen": found.chosen,
        "converged": found.converged,
    }


def _mean_imbalance(seen: dict[str, float], names: Sequence[str]) -> float:
    return sum(compute_imbalance(seen[name]) for name in names) / len(names)


def _say(progress: DebiasProgress) -> None:
    factors, shares = (
        " ".join(f"{share:.3f}" for share in each.values())
        for each in (progress.result.factors, progress.result.shares)
    )
    print(f"round {progress.round}/{progress.rounds}  edit {progress.edit_index}  F {factors}  R {shares}", flush=True)  # noqa: T201


def as_table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    lines = [
        "| profession | women before | after | Δ_p before | after | F of woman | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["professions"].items():
        women, delta = row["women"], row["delta_p"]
        lines.append(
            f"| {name} | {women['before']:.1%} | {women['after']:.1%} | {delta['before']:.2f} | {delta['after']:.2f} "
            f"| {row['factors'][f'woman {name}']:.3f} | {len(row['rounds'])} |"
        )
    delta, held_out = report["delta_p"], report["held_out"]
    lines.append(f"| mean | | | {delta['before']:.2f} | {delta['after']:.2f} | | |")
    lines.append("")
    lines.append(f"Held-out concepts: confidence {held_out['before']:.3f} before, {held_out['after']:.3f} after.")
    return "\n".join(lines)


def main() -> None:
    known = professions()
    parser = argparse.ArgumentParser(prog="python -m demo.debias", description=__doc__.splitlines()[0])
    parser.add_argument("professions", nargs="*", metavar="profession", help=f"default: all of {', '.join(known)}")
    parser.add_argument(
        "--pictures", type=int, default=SEARCH.pictures, help="of each in a round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=SEARCH.rounds, help="at most (default: %(default)s)")
    parser.add_argument(
        "--judged", type=int, default=JUDGED.pictures, help="pictures of each to judge by (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.professions) - set(known)):
        parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    for name in ("pictures", "rounds", "judged"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    report = run(
        arguments.professions or known,
        search=replace(SEARCH, pictures=arguments.pictures, rounds=arguments.rounds),
        judged=replace(JUDGED, pictures=arguments.judged),
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(as_table(report))  # noqa: T201


if __name__ == "__main__":
    main()
