"""The emoji edition of ICEB: its two tasks on the emoji model, from three fixed choices of edits.

The choices lie beside this file, one JSON of each seed, made by `python -m demo.benchmark.build`. Installed as the
benchmark `demo` of `python -m editing.evaluation`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from demo.classify import load_classifier
from demo.concepts import WEIGHTS, read_concepts
from demo.emoji import GUIDANCE, STEPS
from editing.edits import StageOneSettings
from editing.errors import TaskUnreadable
from editing.evaluation.benchmark import Benchmark
from editing.evaluation.iceb import Case, HeldOut, Prompt, Task, TaskName
from editing.pipelines import load_pipeline
from editing.second_moments.moments import SecondMoments

FOLDER = Path(__file__).parent
SEEDS = 3
SETTINGS = StageOneSettings(guidance_scale=GUIDANCE, num_inference_steps=STEPS)


def load(*, device: str = "cpu", weights: Path = WEIGHTS) -> Benchmark:
    """Return the emoji model with its classifier, its second moments and the tasks. Raises FileNotFoundError where the
    weights are not there."""
    pipeline = load_pipeline(weights / "pipeline", device=device)
    return Benchmark(
        name="emoji",
        pipeline=pipeline,
        classifier=load_classifier(weights / "classifier.safetensors"),
        second_moments=SecondMoments.load(weights / "pipeline" / "second_moments.safetensors"),
        suite=EmojiEdition(),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        known=known_names(),
    )


def known_names() -> tuple[str, ...]:
    """Return the names that the model was trained with."""
    return tuple(
        name for concept in read_concepts() for name in (concept.name, *concept.aliases) if name not in concept.held_out
    )


def file_of(seed: int, folder: Path = FOLDER) -> Path:
    return folder / f"choice-{seed}.json"


@dataclass(frozen=True)
class EmojiEdition:
    """The committed choices. The task of so many edits is the first of its seed's list, so that small ones are part of
    large ones; the held-out concepts are the same at every size."""

    folder: Path = FOLDER

    def count_edits(self, name: TaskName) -> int:
        return min(len(choice[name]["edits"]) for choice in self._choices)

    def build_task(self, name: TaskName, *, edits: int, seed: int) -> Task:
        if not 0 <= seed < SEEDS:
            raise TaskUnreadable(f"the emoji edition has the seeds 0 … {SEEDS - 1}, not {seed}")
        if not 1 <= edits <= self.count_edits(name):
            raise TaskUnreadable(
                f"the emoji edition has from 1 to {self.count_edits(name)} edits of {name} editing, not {edits}"
            )
        choice = self._choices[seed]
        templates = choice["templates"]
        return Task(
            name,
            cases=tuple(_case(fields, templates) for fields in choice[name]["edits"][:edits]),
            held_out=tuple(HeldOut(fields["name"], _prompts(fields)) for fields in choice[name]["held_out"]),
            settings=SETTINGS,
        )

    @cached_property
    def _choices(self) -> list[Any]:
        return [json.loads(file_of(seed, self.folder).read_text(encoding="utf-8")) for seed in range(SEEDS)]


def _case(fields: Any, templates: list[str]) -> Case:
    free = _prompts(fields)
    seeds = (prompt.seed for prompt in free)
    return Case(
        source=fields["source"],
        destination=fields["destination"],
        source_class=fields["class"],
        destination_class=fields["destination"],
        templates=tuple(Prompt(text, seed) for text, seed in zip(templates, seeds, strict=False)),
        free=free,
        aliases=tuple(fields["aliases"]),
        alias_prompts=free[:2],
        seed=fields["seed"],
    )


def _prompts(fields: Any) -> tuple[Prompt, ...]:
    return tuple(Prompt(text, seed) for text, seed in zip(fields["prompts"], fields["seeds"], strict=True))
