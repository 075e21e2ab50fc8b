"""Measure methods on a benchmark's tasks. Each method, size and seed is measured once and stored in a folder.

The stored results are the confidences of every picture, from which scores can be computed again in other ways. A run
that is killed loses the unit that it was measuring; the next run measures the missing units.
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
from editing.evaluation.benchmark import Benchmark, BenchmarkSource
from editing.evaluation.confidences import measure_confidences
from editing.evaluation.cost import measure_cost
from editing.evaluation.iceb import METRICS, Confidences, Means, Scores, Task, TaskName
from editing.evaluation.intervals import Interval
from editing.evaluation.method import Progress
from editing.evaluation.methods import DESTINATION, METHODS, Emcid, Unedited
from editing.files import write_atomically

BASE = "base"


@dataclass(frozen=True)
class Unit:
    """One measurement: a method on a task."""

    task: TaskName
    edits: int
    seed: int
    method: str


@dataclass(frozen=True)
class Measurement:
    confidences: Confidences
    seconds: float
    """Wall time of the edits, without the pictures."""
    peak_mb: float
    """Peak memory of the edits."""


@dataclass(frozen=True)
class Result:
    """One method over all seeds."""

    scores: Mapping[str, Interval | None]
    """By metric; None if the task does not define it."""
    means: Mapping[str, Interval | None]
    """The means whose differences the scores are."""
    seconds: float
    """Mean over the seeds."""
    peak_mb: float
    """Maximum over the seeds."""


def measure_unit(benchmark: Benchmark, unit: Unit, *, progress: Progress | None = None) -> Measurement:
    """Edit, draw every prompt of the task and classify the pictures. The pipeline is restored."""
    task = benchmark.suite.build_task(unit.task, edits=unit.edits, seed=unit.seed)
    unknown = task.list_classes() - set(benchmark.classifier.names)
    if unknown:
        raise TaskUnreadable(f"the classifier knows no class {min(unknown)!r}, which the task needs")
    method = METHODS[unit.method]
    edited = (method.with_known(benchmark.known) if isinstance(method, Emcid) else method)(
        benchmark.pipeline, task.build_edits(), benchmark.second_moments, seed=unit.seed, progress=progress
    )
    with ExitStack() as stack:
        with measure_cost(benchmark.pipeline.device) as cost:
            stack.enter_context(edited)
        confidences = measure_confidences(
            benchmark.pipeline,
            benchmark.classifier,
            task.build_questions(),
            num_inference_steps=benchmark.num_inference_steps,
            guidance_scale=benchmark.guidance_scale,
            destination_prompts=unit.method == DESTINATION,
        )
    return Measurement(confidences, cost.seconds, cost.peak_mb)


@dataclass(frozen=True)
class MeasurementStore:
    """A folder with a JSON file for each unit, named by everything that its numbers depend on."""

    folder: Path
    benchmark: Benchmark

    def load(self, unit: Unit) -> Measurement | None:
        """Return the measurement, or None if it is missing or damaged."""
        try:
            fields = json.loads(self.build_path(unit).read_text(encoding="utf-8"))
            confidences = Confidences(tuple(fields["wanted"]), tuple(fields["original"]))
            return Measurement(confidences, fields["seconds"], fields["peak_mb"])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def save(self, unit: Unit, measurement: Measurement) -> None:
        fields = {
            "facts": self.describe_unit(unit),
            "seconds": measurement.seconds,
            "peak_mb": measurement.peak_mb,
            **asdict(measurement.confidences),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.build_path(unit), json.dumps(fields, ensure_ascii=False).encode())

    def describe_unit(self, unit: Unit) -> dict[str, Any]:
        """Return everything that the numbers depend on; the engine's version stands for the methods' code."""
        task = self.benchmark.suite.build_task(unit.task, edits=unit.edits, seed=unit.seed)
        method = METHODS[unit.method]
        preserves_known = isinstance(method, Emcid) and method.preserves_known
        return {
            **asdict(unit),
            "method_settings": repr(method),
            "known": _hash_reprs(self.benchmark.known) if preserves_known else None,
            "edits_sha256": None if isinstance(method, Unedited) else _hash_reprs(task.build_edits()),
            "questions_sha256": _hash_reprs(task.build_questions()),
            **describe_settings(self.benchmark),
        }

    def build_path(self, unit: Unit) -> Path:
        key = hashlib.sha256(json.dumps(self.describe_unit(unit), sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{unit.task}-{unit.edits}-seed{unit.seed}-{unit.method}-{key}.json"


def _hash_reprs(parts: Sequence[Any]) -> str:
    """Return the sha256 of dataclasses by their `repr`, which has all of their fields."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def describe_settings(benchmark: Benchmark) -> dict[str, Any]:
    """Return what a report says about the model and how its pictures were drawn."""
    pipeline = benchmark.pipeline
    return {
        "benchmark": benchmark.name,
        "sampler": type(pipeline.generator.scheduler).__name__,
        "num_inference_steps": benchmark.num_inference_steps,
        "guidance_scale": benchmark.guidance_scale,
        "dtype": str(pipeline.encoder.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "engine": ENGINE_VERSION,
        "torch": torch.__version__,
        "digests": benchmark.digests,
    }


def measure_units(
    source: BenchmarkSource,
    units: Sequence[Unit],
    *,
    folder: Path,
    jobs: int = 1,
    done: Callable[[Unit], None] | None = None,
) -> tuple[Benchmark, dict[Unit, Measurement]]:
    """Measure the units that the folder does not have yet. `done` is called with each unit that it has.

    Each of several jobs is a process with a model of its own and one thread. The numbers are the same for the same
    number of jobs on the same machine.
    """
    benchmark = source.open()
    store = MeasurementStore(folder, benchmark)
    measurements = {unit: store.load(unit) for unit in units}
    missing = [unit for unit, measurement in measurements.items() if measurement is None]
    for unit in measurements.keys() - set(missing):
        if done:
            done(unit)
    for unit in _measure_missing(source, store, missing, jobs=min(jobs, len(missing))):
        measurements[unit] = store.load(unit)
        if done:
            done(unit)
    return benchmark, {unit: measurement for unit, measurement in measurements.items() if measurement is not None}


def _measure_missing(
    source: BenchmarkSource, store: MeasurementStore, units: Sequence[Unit], *, jobs: int
) -> Iterator[Unit]:
    if jobs <= 1:
        for unit in units:
            store.save(unit, measure_unit(store.benchmark, unit))
            yield unit
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _open_store, (source, store.folder)) as pool:
        try:
            for measured in as_completed([pool.submit(_measure_in_pool, unit) for unit in units]):
                yield measured.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_store: MeasurementStore
"""Of a process of the pool."""


def _open_store(source: BenchmarkSource, folder: Path) -> None:
    global _store
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _store = MeasurementStore(folder, source.open())


def _end_with_parent() -> None:
    """End this process when its parent ends. The processes of a killed run would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure_in_pool(unit: Unit) -> Unit:
    _store.save(unit, measure_unit(_store.benchmark, unit))
    return unit


def summarize_methods(benchmark: Benchmark, measurements: Mapping[Unit, Measurement]) -> dict[str, Result]:
    """Return the result of each method over the seeds.

    The units must be of one task and size, and include the base for each seed.
    """
    tasks: dict[int, Task] = {}
    means: dict[str, dict[int, Means]] = {}
    for unit, measurement in measurements.items():
        if unit.seed not in tasks:
            tasks[unit.seed] = benchmark.suite.build_task(unit.task, edits=unit.edits, seed=unit.seed)
        questions = tasks[unit.seed].build_questions()
        means.setdefault(unit.method, {})[unit.seed] = Means.average(questions, measurement.confidences)
    return {
        method: _summarize_seeds(
            [Scores.compare(means[BASE][seed], after) for seed, after in by_seed.items()],
            list(by_seed.values()),
            [measurement for unit, measurement in measurements.items() if unit.method == method],
        )
        for method, by_seed in means.items()
    }


def _summarize_seeds(scores: Sequence[Scores], means: Sequence[Means], measurements: Sequence[Measurement]) -> Result:
    return Result(
        scores={metric: _build_interval(getattr(score, metric) for score in scores) for metric in METRICS},
        means={name: _build_interval(getattr(mean, name) for mean in means) for name in Means.__dataclass_fields__},
        seconds=sum(measurement.seconds for measurement in measurements) / len(measurements),
        peak_mb=max(measurement.peak_mb for measurement in measurements),
    )


def _build_interval(runs: Iterable[float | None]) -> Interval | None:
    defined = [run for run in runs if run is not None]
    return Interval.of(defined) if defined else None
