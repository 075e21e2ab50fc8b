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
from demo.classify import Classifier, classify, load_classifier
from demo.concepts import GENDERS, WEIGHTS, read_concepts
from demo.corrections import HELD_OUT_PROMPT
from editing.concepts import Balance, ConceptEdit, StageOneSettings
from editing.debias import Debiased, DebiasProgress, DebiasSettings, debias, picture_shares
from editing.evaluation.gender import imbalance
from editing.pipelines import EditablePipeline
from editing.update import applied, compute_update
from editing.values import Value

TEMPLATES = ("a photo of a {}", "{}")
"""What is drawn of a profession; the first is no template of the edits."""
SEARCH = DebiasSettings(pictures=48, solver_steps=8, guidance=3.0, templates=TEMPLATES)
JUDGED = replace(SEARCH, seed=100_000)
STAGE_ONE = StageOneSettings(objective="text")
HELD_OUT = 48


def professions() -> list[str]:
    """The concepts whose neutral captions were trained with more of one gender."""
    return [concept.name for concept in read_concepts() if concept.skew is not None]


def balanced(profession: str, *, settings: StageOneSettings = STAGE_ONE) -> ConceptEdit:
    """The edit that asks for both genders in equal shares."""
    return ConceptEdit(profession, Balance({f"{gender} {profession}": 0.5 for gender in GENDERS}), settings=settings)


def run(
    names: Sequence[str], *, search: DebiasSettings = SEARCH, judged: DebiasSettings = JUDGED, weights: Path = WEIGHTS
) -> dict[str, Any]:
    """Balance these professions together; Δ_p before and after, the rounds, and what became of the other concepts."""
    pipeline = editing.load_pipeline(weights / "pipeline")
    classifier = load_classifier(weights / "classifier.safetensors")
    moments = editing.FactoredMoments(
        editing.SecondMoments.load(weights / "pipeline" / "second_moments.safetensors"), encoder=pipeline.encoder.name
    )
    edits = [balanced(name) for name in names]
    start = time.monotonic()
    values = []
    for outcome in editing.optimize_values(pipeline, edits):
        if not isinstance(outcome, Value):
            raise outcome
        values.append(outcome)
    before = _judge(pipeline, classifier, edits, settings=judged)
    found = debias(pipeline, edits, values, [moments], classifier, settings=search, progress=_say)
    update = compute_update(pipeline.encoder, edits, [each.value for each in found], moments)
    with applied(pipeline.encoder, update):
        after = _judge(pipeline, classifier, edits, settings=judged)
    return {
        "professions": {
            name: _figures(each, before[name], after[name]) for name, each in zip(names, found, strict=True)
        },
        "delta_p": {when: _mean_imbalance(seen, names) for when, seen in (("before", before), ("after", after))},
        "held_out": {"before": before["held out"], "after": after["held out"]},
        "search": asdict(search),
        "judged": asdict(judged),
        "seconds": round(time.monotonic() - start, 1),
    }


def _judge(
    pipeline: EditablePipeline, classifier: Classifier, edits: Sequence[ConceptEdit], *, settings: DebiasSettings
) -> dict[str, float]:
    """The share of women in each profession's pictures, and under "held out" the mean confidence of other concepts."""
    others = [concept.name for concept in read_concepts() if concept.skew is None]
    held_out = [others[number * len(others) // HELD_OUT] for number in range(HELD_OUT)]
    prompts = [HELD_OUT_PROMPT.format(name) for name in held_out]
    seeds = range(settings.seed, settings.seed + HELD_OUT)
    pictures = editing.draw(pipeline, prompts, seeds=seeds, steps=settings.solver_steps, guidance=settings.guidance)
    confidences = classify(pictures, classifier)
    kept = sum(float(confidences.of_concept(name)[number]) for number, name in enumerate(held_out)) / HELD_OUT
    shares = {edit.source: picture_shares(pipeline, edit, classifier, settings=settings) for edit in edits}
    return {name: share[f"woman {name}"] for name, share in shares.items()} | {"held out": kept}


def _figures(found: Debiased, before: float, after: float) -> dict[str, Any]:
    return {
        "women": {"before": before, "after": after},
        "delta_p": {"before": imbalance(before), "after": imbalance(after)},
        "factors": dict(found.factors),
        "rounds": [asdict(each) for each in found.rounds],
        "chosen": found.chosen,
        "converged": found.converged,
    }


def _mean_imbalance(seen: dict[str, float], names: Sequence[str]) -> float:
    return sum(imbalance(seen[name]) for name in names) / len(names)


def _say(progress: DebiasProgress) -> None:
    factors, shares = (
        " ".join(f"{share:.3f}" for share in each.values()) for each in (progress.found.factors, progress.found.shares)
    )
    print(f"round {progress.number}/{progress.rounds}  edit {progress.edit_index}  F {factors}  R {shares}", flush=True)  # noqa: T201


def as_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
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
