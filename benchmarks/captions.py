"""How the quality of edits depends on the number of captions that second moments are estimated over.

    python -m benchmarks.captions --counts 1000 10000 100000 --json captions.json

On the emoji model. Each seed chooses concepts to edit, what each is to become, and concepts to leave alone; the values
are optimised once, by the text objective. For each number of captions: second moments, stage II, and pictures, which
the model's classifier judges.

S2D is the mean confidence of the destination in pictures of free prompts that name the source; HD the change of the
mean confidence of concepts that were left alone; F1 the mean of the two, as in the paper's Tab. 3. Each is the mean
over the seeds, with the standard deviation. The last line on stdout is JSON.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from diffusers import StableDiffusionPipeline

import editing
from demo.captions import caption_set
from demo.classify import Classifier, classify, load_classifier
from demo.concepts import WEIGHTS, Concept, read_concepts
from demo.corrections import FREE_PROMPTS, HELD_OUT_PROMPT
from demo.draw import STEPS, draw, load_pipeline
from editing.concepts import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.encoders import EditableEncoder
from editing.errors import SingularSecondMoment
from editing.statistics import FactoredMoments, estimate_second_moments
from editing.update import applied, compute_update
from editing.values import optimize_values


@dataclass(frozen=True)
class Task:
    """What one seed chooses: what each concept is to become, and what is to stay as it is."""

    pairs: tuple[tuple[str, str], ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    s2d: float
    hd: float

    @property
    def f1(self) -> float:
        return (self.s2d + self.hd) / 2


@dataclass(frozen=True)
class Row:
    """One number of captions. A score for each seed; none where the second moments have no inverse."""

    captions: int
    tokens: int
    scores: tuple[Score, ...]


def choose(concepts: Sequence[Concept], *, seed: int, edits: int, held_out: int) -> Task:
    """Of the concepts that have no gender, each in one role at most."""
    names = [concept.name for concept in concepts if concept.skew is None]
    chosen = random.Random(seed).sample(names, 2 * edits + held_out)
    return Task(tuple(zip(chosen[:edits], chosen[edits : 2 * edits], strict=True)), tuple(chosen[2 * edits :]))


@dataclass(frozen=True)
class Judge:
    """Draws a task's prompts, each with a seed of its own, and reads what the classifier sees."""

    pipeline: StableDiffusionPipeline
    classifier: Classifier
    steps: int

    def see(self, task: Task) -> tuple[float, float]:
        """Mean confidence of the destinations, and of the concepts that are held out."""
        edited = [(prompt.format(source), target) for source, target in task.pairs for prompt in FREE_PROMPTS]
        asked = edited + [(HELD_OUT_PROMPT.format(name), name) for name in task.held_out]
        pictures = draw(self.pipeline, [prompt for prompt, _ in asked], range(len(asked)), steps=self.steps)
        seen = classify(pictures, self.classifier)
        confidences = [float(seen.of_concept(name)[index]) for index, (_, name) in enumerate(asked)]
        return mean(confidences[: len(edited)]), mean(confidences[len(edited) :])


def run(arguments: argparse.Namespace) -> tuple[Row, ...]:
    """The rows, the first without any edit."""
    concepts = read_concepts()
    editable = editing.load_pipeline(arguments.weights / "pipeline")
    pipeline = load_pipeline(arguments.weights / "pipeline")
    drawn = EditableEncoder(pipeline.text_encoder, editable.tokenizer)
    classifier = load_classifier(arguments.weights / "classifier.safetensors")
    judge = Judge(pipeline, classifier, steps=arguments.picture_steps)

    settings = StageOneSettings(objective="text", steps=arguments.steps)
    work = []
    for seed in range(arguments.seeds):
        task = choose(concepts, seed=seed, edits=arguments.edits, held_out=arguments.held_out)
        edits = [ConceptEdit(source, DestinationPrompt(target), settings=settings) for source, target in task.pairs]
        work.append((task, edits, optimize_values(editable, edits), judge.see(task)))
        say(f"seed {seed}: values of {len(edits)} edits, pictures before")

    rows = [Row(0, 0, tuple(Score(before[0], 0.0) for *_, before in work))]
    for count in sorted(arguments.counts):
        moments = estimate_second_moments(editable.encoder, caption_set(concepts, count=count))
        factored = FactoredMoments(moments)
        scores = []
        try:
            for task, edits, values, (_, held_out) in work:
                with applied(drawn, compute_update(editable.encoder, edits, values, factored)):
                    s2d, after = judge.see(task)
                scores.append(Score(s2d, after - held_out))
        except SingularSecondMoment as error:
            say(f"{count} captions: {error}")
        rows.append(Row(count, moments.tokens, tuple(scores)))
        say(f"{count} captions: done")
    return tuple(rows)


def table(rows: Sequence[Row], *, edits: int) -> str:
    lines = [f"| captions ({edits} edits) | tokens | S2D | HD | F1 |", "|---|---|---|---|---|"]
    for row in rows:
        name = f"{row.captions:,}" if row.captions else "none: no edit"
        figures = [[score.s2d for score in row.scores], [score.hd for score in row.scores]]
        figures.append([score.f1 for score in row.scores])
        cells = [f"{mean(values):.3f} ± {pstdev(values):.3f}" if values else "no inverse" for values in figures]
        lines.append(f"| {name} | {row.tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = {"edits": arguments.edits, "held_out": arguments.held_out, "steps": arguments.steps}
    return {"benchmark": "captions", **chosen, "rows": [asdict(row) for row in rows]}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


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
