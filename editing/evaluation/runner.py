"""Measure methods on a benchmark's tasks. Each method, size and seed is measured once and kept in a folder.

What is kept is the confidence read off every picture, so that scores can be computed again, and in other ways. A
killed run loses what it was measuring at that moment; started again, it goes on with the rest.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from editing import ENGINE_VERSION
from editing.errors import TaskUnreadable
from editing.evaluation.benchmark import Benchmark, Opening
from editing.evaluation.cost import measured
from editing.evaluation.iceb import METRICS, Answers, Means, Scores, Task, TaskName
from editing.evaluation.intervals import Interval
from editing.evaluation.judging import answer
from editing.evaluation.methods import DESTINATION, METHODS, Emcid, Progress, Unedited
from editing.files import write_atomically

BASE = "base"


@dataclass(frozen=True)
class Unit:
    """What is measured in one go."""

    task: TaskName
    edits: int
    seed: int
    method: str


@dataclass(frozen=True)
class Measurement:
    answers: Answers
    seconds: float
    """Wall time of making the edits, pictures not counted."""
    peak_mb: float
    """The most memory held while making them."""


@dataclass(frozen=True)
class Result:
    """One method over all seeds."""

    scores: Mapping[str, Interval | None]
    """By metric; None for one that the task does not define."""
    means: Mapping[str, Interval | None]
    """What the scores are differences of."""
    seconds: float
    """Mean over the seeds."""
    peak_mb: float
    """The largest of any seed."""


def measure(benchmark: Benchmark, unit: Unit, *, progress: Progress | None = None) -> Measurement:
    """Edit, draw every prompt of the task and read the pictures. The pipeline is left as it was."""
    task = benchmark.suite.task(unit.task, edits=unit.edits, seed=unit.seed)
    unknown = task.classes() - set(benchmark.classifier.names)
    if unknown:
        raise TaskUnreadable(f"the classifier knows no class {min(unknown)!r}, which the task asks for")
    questions = task.questions()
    method = METHODS[unit.method]
    edited = (method.keeping(benchmark.known) if isinstance(method, Emcid) else method)(
        benchmark.pipeline, task.edits(), benchmark.second_moments, seed=unit.seed, progress=progress
    )
    with ExitStack() as stack:
        with measured(benchmark.pipeline.device) as cost:
            stack.enter_context(edited)
        answers = answer(
            benchmark.pipeline,
            benchmark.classifier,
            questions,
            num_inference_steps=benchmark.num_inference_steps,
            guidance_scale=benchmark.guidance_scale,
            destination_prompts=unit.method == DESTINATION,
        )
    return Measurement(answers, cost.seconds, cost.peak_mb)


@dataclass(frozen=True)
class Kept:
    """The folder of what was measured: a JSON file for each unit, named by all that its numbers depend on."""

    folder: Path
    benchmark: Benchmark

    def load(self, unit: Unit) -> Measurement | None:
        """None where it was not measured yet, or its file is damaged."""
        try:
            fields = json.loads(self.path(unit).read_text(encoding="utf-8"))
            answers = Answers(tuple(fields["wanted"]), tuple(fields["original"]))
            return Measurement(answers, fields["seconds"], fields["peak_mb"])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def save(self, unit: Unit, measurement: Measurement) -> None:
        fields = {
            "facts": self.facts(unit),
            "seconds": measurement.seconds,
            "peak_mb": measurement.peak_mb,
            **asdict(measurement.answers),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(unit), json.dumps(fields, ensure_ascii=False).encode())

    def facts(self, unit: Unit) -> dict[str, Any]:
        """All that the numbers depend on but the code of the methods, whose version is the engine's."""
        task = self.benchmark.suite.task(unit.task, edits=unit.edits, seed=unit.seed)
        method = METHODS[unit.method]
        return {
            **asdict(unit),
            "of": repr(method),
            "known": _sha256(self.benchmark.known) if isinstance(method, Emcid) and method.keeps_known else None,
            "edited": None if isinstance(method, Unedited) else _sha256(task.edits()),
            "asked": _sha256(task.questions()),
            **describe_settings(self.benchmark),
        }

    def path(self, unit: Unit) -> Path:
        key = hashlib.sha256(json.dumps(self.facts(unit), sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{unit.task}-{unit.edits}-seed{unit.seed}-{unit.method}-{key}.json"


def _sha256(parts: Sequence[Any]) -> str:
    """Of dataclasses, by all that their `repr` says."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def describe_settings(benchmark: Benchmark) -> dict[str, Any]:
    """What a report says of how pictures were made, and of what."""
    pipeline = benchmark.pipeline
    return {
        "benchmark": benchmark.name,
        "sampler": type(pipeline.scheduler).__name__,
        "num_inference_steps": benchmark.num_inference_steps,
        "guidance_scale": benchmark.guidance_scale,
        "dtype": str(pipeline.encoder.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "engine": ENGINE_VERSION,
        "torch": torch.__version__,
        "digests": benchmark.digests,
    }


def run(
    opening: Opening,
    units: Sequence[Unit],
    *,
    folder: Path,
    jobs: int = 1,
    done: Callable[[Unit], None] | None = None,
) -> tuple[Benchmark, dict[Unit, Measurement]]:
    """Measure what is not yet kept in the folder; `done` is called with each unit that is there.

    With several jobs each is a process of its own, with a model of its own and one thread. The numbers are the same
    for the same number of jobs on the same machine.
    """
    benchmark = opening()
    kept = Kept(folder, benchmark)
    found = {unit: kept.load(unit) for unit in units}
    missing = [unit for unit, measurement in found.items() if measurement is None]
    for unit in found.keys() - set(missing):
        if done:
            done(unit)
    for unit in _measured(opening, kept, missing, jobs=min(jobs, len(missing))):
        found[unit] = kept.load(unit)
        if done:
            done(unit)
    return benchmark, {unit: measurement for unit, measurement in found.items() if measurement is not None}


def _measured(opening: Opening, kept: Kept, units: Sequence[Unit], *, jobs: int) -> Iterator[Unit]:
    if jobs <= 1:
        for unit in units:
            kept.save(unit, measure(kept.benchmark, unit))
            yield unit
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _open, (opening, kept.folder)) as pool:
        try:
            for measured_unit in as_completed([pool.submit(_measure, unit) for unit in units]):
                yield measured_unit.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_kept: Kept
"""Of a process of the pool."""


def _open(opening: Opening, folder: Path) -> None:
    global _kept
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _kept = Kept(folder, opening())


def _end_with_parent() -> None:
    """A killed run takes its processes with it, rather than leave them waiting for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure(unit: Unit) -> Unit:
    _kept.save(unit, measure(_kept.benchmark, unit))
    return unit


def results(benchmark: Benchmark, measurements: Mapping[Unit, Measurement]) -> dict[str, Result]:
    """By method, over the seeds; the units must be of one task and size, and hold the base of each seed."""
    tasks: dict[int, Task] = {}
    means: dict[str, dict[int, Means]] = {}
    for unit, measurement in measurements.items():
        if unit.seed not in tasks:
            tasks[unit.seed] = benchmark.suite.task(unit.task, edits=unit.edits, seed=unit.seed)
        questions = tasks[unit.seed].questions()
        means.setdefault(unit.method, {})[unit.seed] = Means.of(questions, measurement.answers)
    return {
        method: _result(
            [Scores.of(means[BASE][seed], after) for seed, after in by_seed.items()],
            list(by_seed.values()),
            [measurement for unit, measurement in measurements.items() if unit.method == method],
        )
        for method, by_seed in means.items()
    }


def _result(scores: Sequence[Scores], means: Sequence[Means], measurements: Sequence[Measurement]) -> Result:
    return Result(
        scores={metric: _interval(getattr(score, metric) for score in scores) for metric in METRICS},
        means={name: _interval(getattr(mean, name) for mean in means) for name in Means.__dataclass_fields__},
        seconds=sum(measurement.seconds for measurement in measurements) / len(measurements),
        peak_mb=max(measurement.peak_mb for measurement in measurements),
    )


def _interval(runs: Iterable[float | None]) -> Interval | None:
    defined = [run for run in runs if run is not None]
    return Interval.of(defined) if defined else None
