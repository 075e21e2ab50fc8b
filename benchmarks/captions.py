"""How the quality of edits depends on the number of captions that second moments are estimated over.

    python -m benchmarks.captions --counts 1000 10000 100000 --json captions.json

On the emoji model. Each seed chooses concepts to edit, what each is to become, and concepts to leave alone; the values
are optimized once, by the text objective. For each number of captions: second moments, stage II, and pictures, which
the model's classifier judges.

S2D (on free prompts), HD and F1 are those of `benchmarks.quality`, each the mean over the seeds with the standard
deviation. The last line on stdout is JSON.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import editing
from benchmarks.measuring import say
from benchmarks.quality import Examiner, Scores, arbitrary_editing, compare
from demo.captions import caption_set
from demo.classify import load_classifier
from demo.concepts import WEIGHTS, read_concepts
from demo.emoji import STEPS
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.errors import SingularSecondMoment
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.factors import FactoredMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import compute_update


@dataclass(frozen=True)
class Row:
    """One number of captions. A score for each seed; none where the second moments have no inverse."""

    captions: int
    tokens: int
    scores: tuple[Scores, ...]


def run(arguments: argparse.Namespace) -> tuple[Row, ...]:
    concepts = read_concepts()
    pipeline = editing.load_pipeline(arguments.weights / "pipeline")
    classifier = load_classifier(arguments.weights / "classifier.safetensors")
    examiner = Examiner(pipeline, classifier, num_inference_steps=arguments.picture_steps)

    settings = StageOneSettings(objective="text", optimization_steps=arguments.steps)
    work = []
    for seed in range(arguments.seeds):
        task = arbitrary_editing(concepts, edits=arguments.edits, seed=seed, held_out=arguments.held_out)
        edits = [ConceptEdit(source, DestinationPrompt(target), settings=settings) for source, target in task.pairs]
        work.append((task, edits, optimize_values(pipeline, edits), examiner.means(task)))
        say(f"seed {seed}: values of {len(edits)} edits, pictures before")

    rows = []
    for count in sorted(arguments.counts):
        moments = estimate_second_moments(pipeline.encoder, caption_set(concepts, count=count))
        factored = FactoredMoments(moments)
        scores = []
        try:
            for task, edits, values, before in work:
                update = compute_update(pipeline.encoder, edits, values, factored)
                scores.append(compare(before, examiner.means(task, update)))
        except SingularSecondMoment as error:
            say(f"{count} captions: {error}")
        rows.append(Row(count, moments.tokens, tuple(scores)))
        say(f"{count} captions: done")
    return tuple(rows)


def table(rows: Sequence[Row], *, edits: int) -> str:
    lines = [f"| captions ({edits} edits) | tokens | S2D | HD | F1 |", "|---|---|---|---|---|"]
    for row in rows:
        figures = [[score.s2d_free for score in row.scores], [score.hd for score in row.scores]]
        figures.append([score.f1 for score in row.scores])
        cells = [f"{mean(values):.3f} ± {pstdev(values):.3f}" if values else "no inverse" for values in figures]
        lines.append(f"| {row.captions:,} | {row.tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = {"edits": arguments.edits, "held_out": arguments.held_out, "steps": arguments.steps}
    return {"benchmark": "captions", **chosen, "rows": [asdict(row) for row in rows]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of captions")
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="of the choice of edits")
    parser.add_argument("--steps", type=int, default=150, help="of stage I")
    parser.add_argument("--picture-steps", type=int, default=STEPS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="with pipeline/ and classifier.safetensors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    rows = run(chosen)
    print(table(rows, edits=chosen.edits))  # noqa: T201
    result = figures(rows, chosen)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
