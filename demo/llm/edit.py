"""Edit many concepts at once and measure it: `python -m demo.llm.edit FOLDER`, one line of JSON for each run.

Stage I starts with the text loss and ends with the generator's loss, with a short δ: the generator reads every token
of a name, so that the text loss alone fails for names of several. Stage II writes early layers. Half or more of its
second moments are names that are neither edited nor judged.

Seeds from 100 on are for tuning. Those below were never looked at before the settings here were final.
"""

import argparse
import itertools
import json
import logging
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

import torch

import editing
from demo.classify import Classifier, load_classifier
from demo.concepts import Concept
from demo.llm.captions import sample
from demo.llm.concepts import CLASSIFIER, read_all_concepts
from demo.llm.draw import GUIDANCE, STEPS
from demo.llm.generator import use_fixed_size
from demo.llm.judging import draw_pictures, judge_task, measure_confidences
from demo.llm.settings import parse_settings
from demo.llm.tasks import TURNS, Task, TaskName, fill_names, fill_templates
from editing.edits import UPDATE_PRESETS, ConceptEdit, DestinationPrompt, ReferenceImages, StageOneSettings
from editing.uce.projections import apply_temporarily as apply_projections_temporarily
from editing.values import EditValue

Method = Literal["ours", "published", "text_only", "text_projection"]
"""`published`: the paper's settings, transplanted. `text_only`: ours without the generator's loss. `text_projection`:
UCE on the matrix through which the transformer reads the text."""

TEMPLATES = ("a photo of a {}", "a drawing of a {}", "{}", "a small {}")
PUBLISHED_TEMPLATES = ("an image of {}", "a photo of {}", "{}")
NOISE_POOL = 32
CAPTIONS = 1500
REFERENCE_IMAGES = 4
QUESTIONS = ("destination", "held_out", "own_prompts", "aliases")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How concepts are edited."""

    layer: int = 4
    """The layer that values are optimized for."""
    edited_layers: int = 3
    """Number of layers up to it that are edited."""
    text_steps: int = 12
    noise_steps: int = 50
    """Steps of the generator's loss alone, after those of the text loss."""
    step_length: float = 0.08
    """Of Adam, as a share of ‖h‖."""
    max_delta_norm: float = 0.45
    """Of ‖h‖."""
    noise_batch_size: int = 2
    contexts: Literal["own", "many"] = "own"
    weight: float = 0.0
    """Of everything that is preserved. 0: by the number of edits."""
    names: float = 0.0
    """The names' share of it. 0: by the number of edits."""
    alpha: float = 0.5

    def weigh_preservation(self, edits: int) -> tuple[float, float]:
        """Return the weights of the captions' second moments and of all preserved names together."""
        whole = self.weight or max(1000.0, 30.0 * edits)
        names = self.names or (0.5 if edits < 100 else 0.9)
        return whole * (1 - names), whole * names


Values = tuple[list[ConceptEdit], list[EditValue | editing.EditingError]]
"""Edits, and what stage I found for each."""


@dataclass
class Bench:
    """The pipeline with what runs share."""

    folder: Path
    device: str
    classifier: Classifier
    concepts: Sequence[Concept]
    steps: int = STEPS
    """Of a picture."""
    questions: Sequence[str] = QUESTIONS
    """Those that are answered, of a task's."""
    _moments: dict[tuple[int, ...], editing.FactoredMoments] = field(default_factory=dict)
    _before: dict[Task, dict[str, float]] = field(default_factory=dict)
    _values: dict[tuple[Task, StageOneSettings, tuple[str, ...]], Values] = field(default_factory=dict)

    @cached_property
    def pipeline(self) -> editing.EditablePipeline:
        return use_fixed_size(editing.load_pipeline(self.folder, device=self.device, generator_dtype=torch.float32))

    @property
    def drawn_at_once(self) -> int:
        return 256 if self.device == "cuda" else 32

    def estimate_moments(self, layers: Sequence[int]) -> editing.FactoredMoments:
        """Estimate the second moments of layers over captions of all concepts, or return those of an earlier run."""
        layers = tuple(layers)
        if layers not in self._moments:
            chance = random.Random(0)
            captions = [sample(chance, self.concepts).text for _ in range(CAPTIONS)]
            moments = editing.estimate_second_moments(self.pipeline.encoder, captions, layers=layers)
            self._moments[layers] = editing.FactoredMoments(moments, encoder=self.pipeline.encoder.name)
        return self._moments[layers]

    def optimize_values(self, task: Task, stage_one: StageOneSettings, templates: tuple[str, ...]) -> Values:
        """Run stage I, once for all settings of stage II."""
        key = task, stage_one, templates
        if key not in self._values:
            edits = build_edits(self, task, stage_one, templates)
            batch = 100 if self.device == "cuda" else 32
            self._values = {key: (edits, editing.optimize_values(self.pipeline, edits, max_batch=batch))}
        return self._values[key]

    def find_misunderstood(self) -> frozenset[str]:
        """Return the names that training never had and whose pictures show something else than the concept."""
        named = [(alias, concept.name) for concept in self.concepts for alias in concept.held_out]
        prompts, shown = zip(*fill_templates(named), strict=True)
        pictures = draw_pictures(
            self.pipeline, prompts, steps=self.steps, guidance_scale=GUIDANCE, batch=self.drawn_at_once
        )
        confidences = measure_confidences(pictures, shown, self.classifier).view(TURNS, len(named)).mean(0)
        return frozenset(alias for (alias, _), own in zip(named, confidences.tolist(), strict=True) if own < 0.5)

    def measure_before(self, task: Task) -> dict[str, float]:
        """Judge the unedited pipeline, once for all methods."""
        if task not in self._before:
            self._before[task] = self.judge(task)
        return self._before[task]

    def judge(self, task: Task) -> dict[str, float]:
        """Return the mean confidence in the pictures of each of the task's questions."""
        return judge_task(
            self.pipeline,
            self.classifier,
            task,
            names=self.questions,
            steps=self.steps,
            guidance_scale=GUIDANCE,
            batch=self.drawn_at_once,
        )

    def measure_hidden_norm(self, template: str, source: str, layer: int) -> float:
        """Return ‖h‖ at the last token of a source."""
        settings = StageOneSettings(objective="text", optimization_steps=1, layer=layer)
        probe = ConceptEdit(source, DestinationPrompt(source), (template,), settings)
        (value,) = editing.optimize_values(self.pipeline, [probe])
        if isinstance(value, Exception):
            raise value
        return value.encoders[self.pipeline.encoder.name].hidden_norm


def choose_stage_one(bench: Bench, task: Task, settings: Settings, method: Method) -> StageOneSettings:
    """Return the settings of stage I of a method."""
    encoder = bench.pipeline.encoder
    pictures: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": GUIDANCE}
    if method == "published":
        return StageOneSettings.preset("published", layer=encoder.last_value_layer, **pictures)
    length = bench.measure_hidden_norm(TEMPLATES[0], task.sources[0], settings.layer)
    text = settings.text_steps
    return StageOneSettings(
        objective="text" if method == "text_only" else "noise" if task.name == "images" else "hybrid",
        layer=settings.layer,
        warmup_steps=text,
        optimization_steps=text if method == "text_only" else text + settings.noise_steps,
        text_weight=0.0 if method == "ours" and task.name != "images" else 0.01,
        learning_rate=settings.step_length * length / encoder.width**0.5,
        max_delta_norm=settings.max_delta_norm,
        num_images=len(TEMPLATES),
        noise_pool_size=NOISE_POOL,
        noise_batch_size=settings.noise_batch_size,
        **pictures,
    )


def build_edits(bench: Bench, task: Task, stage_one: StageOneSettings, templates: Sequence[str]) -> list[ConceptEdit]:
    """Return the edits of a task. Pictures of a destination are those that the unedited pipeline draws."""
    destinations: list[DestinationPrompt | ReferenceImages]
    if task.name == "images":
        prompts = [TEMPLATES[0].format(goal) for goal in task.destinations for _ in range(REFERENCE_IMAGES)]
        drawn = editing.draw_pictures(
            bench.pipeline,
            prompts,
            seeds=range(1000, 1000 + len(prompts)),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        starts = range(0, len(drawn), REFERENCE_IMAGES)
        destinations = [ReferenceImages(tuple(drawn[start : start + REFERENCE_IMAGES])) for start in starts]
    else:
        destinations = [DestinationPrompt(goal) for goal in task.destinations]
    return [
        ConceptEdit(source, goal, tuple(templates), stage_one)
        for source, goal in zip(task.sources, destinations, strict=True)
    ]


@contextmanager
def edited(
    bench: Bench, task: Task, method: Method, settings: Settings, seconds: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Edit the pipeline for as long as the block runs. Yields what the edit reports; `seconds` receives its times."""
    pipeline, preserve = bench.pipeline, fill_names(task.preserved)
    clock = Clock(seconds)
    if method == "text_projection":
        edits = build_edits(bench, task, StageOneSettings(), TEMPLATES)
        projections = editing.compute_projection_update(pipeline, edits, preserve=preserve)
        clock.stop("projection")
        with apply_projections_temporarily(pipeline.generator, projections):
            yield {}
        return
    stage_one = choose_stage_one(bench, task, settings, method)
    edits, values = bench.optimize_values(task, stage_one, TEMPLATES if method != "published" else PUBLISHED_TEMPLATES)
    clock.stop("stage_one")
    assert stage_one.layer is not None
    if method == "published":
        layers = range(stage_one.layer + 1)
        options: dict[str, Any] = dict(UPDATE_PRESETS["published"])
    else:
        layers = range(stage_one.layer + 1 - settings.edited_layers, stage_one.layer + 1)
        captions, names = settings.weigh_preservation(len(edits))
        options = {
            "moment_weight": captions,
            "preserve": preserve,
            "preserve_weight": names / max(len(preserve), 1),
            "alpha": settings.alpha,
            "contexts": settings.contexts,
        }
    moments = bench.estimate_moments(layers)
    clock.stop("moments")
    update = editing.compute_update(pipeline.encoder, edits, values, moments, layers=list(layers), **options)
    clock.stop("stage_two")
    with editing.apply_temporarily(pipeline.encoder, update):
        yield {
            "residual": sum(update.relative_residuals) / len(edits),
            "noise_loss": average_losses([value.noise_losses for value in values if isinstance(value, EditValue)]),
            "relative_norms": [round(change.relative_norm, 3) for change in update.layers.values()],
        }


def average_losses(losses: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of the first five steps and of the last five, over all edits."""
    return [mean(step for own in losses for step in own[part]) for part in (slice(5), slice(-5, None)) if any(losses)]


def run(bench: Bench, task: Task, method: Method, settings: Settings) -> dict[str, Any]:
    """Edit, judge, and return the figures."""
    seconds: dict[str, float] = {}
    clock = Clock(seconds)
    before = bench.measure_before(task)
    clock.stop("before")
    with edited(bench, task, method, settings, seconds) as facts:
        clock.restart()
        after = bench.judge(task)
        clock.stop("after")
    return {
        "s2d": after["destination"] - before["destination"],
        "hd": after["held_out"] - before["held_out"] if "held_out" in after else None,
        "al2d": after["aliases"] - before["aliases"] if "aliases" in after else None,
        "before": before,
        "after": after,
        "held_out_concepts": len(task.held_out),
        "preserved_concepts": len(task.preserved),
        **facts,
        "seconds": seconds,
    }


class Clock:
    """Notes the seconds of stages that follow each other."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] = round(now - self._start, 1)
        self._start = now
        logger.info("%s: %s s", stage, self._seconds[stage])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.llm.edit", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the pipeline, as `python -m demo.llm.build` writes it")
    parser.add_argument("--edits", type=int, nargs="+", default=[30], help="numbers of edits (default: 30)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the choice of concepts (default: 0)")
    parser.add_argument("--method", nargs="+", choices=get_args(Method), default=["ours"], help="default: ours")
    parser.add_argument("--task", choices=get_args(TaskName), default="concepts", help="default: concepts")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="its weights (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a picture (default: %(default)s)")
    parser.add_argument(
        "--question", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="what is judged; default: all"
    )
    parser.add_argument("--json", type=Path, help="append each run's line to this file, too")
    names = [setting.name for setting in fields(Settings)]
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"change {', '.join(names)}")
    parser.add_argument("--settings", type=Path, help="a JSON list of settings to change, each for a run of its own")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    changes = json.loads(given.settings.read_text(encoding="utf-8")) if given.settings else [{}]
    own = parse_settings(given.set)
    classifier = load_classifier(given.classifier).to(given.device)
    concepts = [concept for concept in read_all_concepts() if concept.name in classifier.names]
    bench = Bench(given.folder, given.device, classifier, concepts, steps=given.steps, questions=given.question)
    misunderstood = bench.find_misunderstood() if given.task == "names" else frozenset()
    failed = False
    for edits, seed, method, change in itertools.product(given.edits, given.seed, given.method, changes):
        settings = replace(Settings(), **{**change, **own})
        line: dict[str, Any] = {"method": method, "task": given.task, "edits": edits, "seed": seed}
        logger.info("%s %s", line, change)
        try:
            task = Task.draw(given.task, concepts, edits=edits, seed=seed, misunderstood=misunderstood)
            line |= run(bench, task, method, settings)
        except Exception as error:  # the other runs go on
            traceback.print_exc()
            failed = True
            line["error"] = f"{type(error).__name__}: {error}"
        text = json.dumps({**line, "settings": asdict(settings), "device": given.device})
        print(text, flush=True)  # noqa: T201
        if given.json is not None:
            with given.json.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
