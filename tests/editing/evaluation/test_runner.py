import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from editing.edits import StageOneSettings
from editing.errors import EditingError, TaskUnreadable, UnsupportedPipeline
from editing.evaluation import __main__ as command
from editing.evaluation import runner
from editing.evaluation.benchmark import Benchmark, BenchmarkSource
from editing.evaluation.classifiers import Classifier
from editing.evaluation.iceb import Means
from editing.evaluation.methods import METHODS
from editing.evaluation.runner import MeasurementStore, Unit, measure_unit, measure_units, summarize_methods
from editing.pictures.draw import draw_pictures
from tests.editing.conftest import ROOT

UNIT = Unit("arbitrary", edits=2, seed=0, method="base")


@pytest.fixture
def source(folder: Path, classifier_folder: Path, iceb_folder: Path, moments_file: Path) -> BenchmarkSource:
    return BenchmarkSource(str(folder), str(classifier_folder), iceb_folder, moments_file, num_inference_steps=2)


@pytest.fixture
def benchmark(source: BenchmarkSource) -> Benchmark:
    return source.open()


def test_measurement_has_the_confidence_of_each_prompt(benchmark: Benchmark) -> None:
    questions = benchmark.suite.build_task("arbitrary", edits=2, seed=0).build_questions()
    confidences = measure_unit(benchmark, UNIT).confidences
    pictures = draw_pictures(
        benchmark.pipeline,
        [q.prompt for q in questions],
        seeds=[q.seed for q in questions],
        num_inference_steps=2,
        guidance_scale=7.5,
    )
    for picture, question, wanted, original in zip(
        pictures, questions, confidences.wanted, confidences.original, strict=True
    ):
        expected = benchmark.classifier.classify([picture], [question.wanted, question.original or "cat"])[0]
        assert wanted == pytest.approx(float(expected[0]), abs=1e-4)
        assert original == (None if question.original is None else pytest.approx(float(expected[1]), abs=1e-4))
    assert len(set(confidences.wanted)) > 6  # the pictures differ


def test_the_destination_method_draws_the_destination_prompts(benchmark: Benchmark) -> None:
    questions = benchmark.suite.build_task("arbitrary", edits=2, seed=0).build_questions()
    confidences = measure_unit(benchmark, replace(UNIT, method="destination")).confidences
    assert [answer is None for answer in confidences.wanted] == [q.part == "held out" for q in questions]
    drawn = [q for q in questions if q.destination_prompt]
    pictures = draw_pictures(
        benchmark.pipeline,
        [q.destination_prompt or "" for q in drawn],
        seeds=[q.seed for q in drawn],
        num_inference_steps=2,
        guidance_scale=7.5,
    )
    expected = [float(benchmark.classifier.classify([p], [q.wanted])) for p, q in zip(pictures, drawn, strict=True)]
    assert [answer for answer in confidences.wanted if answer is not None] == pytest.approx(expected, abs=1e-4)


def test_scores_average_over_seeds(source: BenchmarkSource, tmp_path: Path) -> None:
    units = [Unit("arbitrary", 1, seed, method) for seed in (0, 1, 5) for method in ("base", "destination")]
    benchmark, measurements = measure_units(source, units, folder=tmp_path / "kept")
    table = summarize_methods(benchmark, measurements)
    assert list(table) == ["base", "destination"]
    assert all(interval.mean == interval.ci95 == 0 for interval in table["base"].scores.values() if interval)
    differences = []
    for seed in (0, 1, 5):  # the last one has another edit
        questions = benchmark.suite.build_task("arbitrary", edits=1, seed=seed).build_questions()
        means = [
            Means.average(questions, measurements[Unit("arbitrary", 1, seed, name)].confidences)
            for name in ("base", "destination")
        ]
        before, after = (each.destination for each in means)
        assert before is not None and after is not None
        differences.append(after - before)
    s2d, hd, f1 = (table["destination"].scores[name] for name in ("s2d", "hd", "f1"))
    assert s2d and hd and f1 and s2d.ci95
    assert s2d.mean == pytest.approx(sum(differences) / 3) and s2d.ci95 > 0
    assert hd.mean == 0
    assert f1.mean == pytest.approx(s2d.mean / 2)


def test_stored_units_are_not_measured_again(
    source: BenchmarkSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [UNIT, replace(UNIT, method="destination")]
    _, first = measure_units(source, units, folder=tmp_path)
    measured: list[Unit] = []

    def count(benchmark: Benchmark, unit: Unit) -> Any:
        measured.append(unit)
        return measure_unit(benchmark, unit)

    monkeypatch.setattr(runner, "measure_unit", count)
    reported: list[Unit] = []
    _, second = measure_units(source, units, folder=tmp_path, done=reported.append)
    assert second == first and measured == [] and set(reported) == set(units)

    measure_units(source, [*units, replace(UNIT, seed=1)], folder=tmp_path)
    assert measured == [replace(UNIT, seed=1)]
    measure_units(replace(source, num_inference_steps=3), [UNIT], folder=tmp_path)  # other pictures
    assert measured[1:] == [UNIT]
    damaged = MeasurementStore(tmp_path, source.open()).build_path(UNIT)
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert measure_units(source, [UNIT], folder=tmp_path)[1][UNIT].confidences == first[UNIT].confidences
    assert measured[2:] == [UNIT]


def test_path_depends_on_everything_that_changes_the_numbers(benchmark: Benchmark, tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path, benchmark)
    base, ours = UNIT, replace(UNIT, method="emender")
    before = store.build_path(base), store.build_path(ours)
    benchmark.suite = replace(cast(Any, benchmark.suite), settings=StageOneSettings(weight_decay=0.5))
    assert store.build_path(base) == before[0]  # the base does not depend on the settings of edits
    assert store.build_path(ours) != before[1]
    assert len({store.build_path(replace(UNIT, method=method)) for method in METHODS}) == len(METHODS)


def test_unknown_class_is_refused(benchmark: Benchmark) -> None:
    class SmallClassifier:
        names = ("cat", "dog", "fish")

    benchmark.classifier = cast(Classifier, SmallClassifier())
    with pytest.raises(TaskUnreadable, match="knows no class 'bird'"):
        measure_unit(benchmark, UNIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier": None}, "is no installed benchmark"),
        ({"data": None}, "is no installed benchmark"),
        ({"data": Path("nowhere")}, "no readable class2id.json"),
        ({"second_moments": Path("nowhere")}, "estimate the second moments"),
    ],
)
def test_incomplete_benchmark_is_refused(source: BenchmarkSource, change: dict[str, Any], message: str) -> None:
    with pytest.raises(EditingError, match=message):
        replace(source, **change).open()


def test_unknown_model_is_refused(source: BenchmarkSource) -> None:
    with pytest.raises(UnsupportedPipeline, match="no folder"):
        replace(source, model="no/such/model").open()


@pytest.fixture
def arguments(source: BenchmarkSource) -> list[str]:
    chosen = {
        "--model": source.model,
        "--classifier": source.classifier,
        "--data": source.data,
        "--second-moments": source.second_moments,
        "--num-inference-steps": 2,
        "--edits": 2,
    }
    return ["iceb", *(str(part) for pair in chosen.items() for part in pair)]


@pytest.mark.slow
def test_command_prints_a_table_and_writes_json(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    kept = ["--out", str(tmp_path / "kept"), "--seeds", "2", "--methods", "destination"]
    command.main([*arguments, *kept, "--json", str(report)])
    assert "destination" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["edits"] == 2 and list(written["methods"]) == ["base", "destination"]
    destination = written["methods"]["destination"]
    for metric in ("sf", "s2d_template", "s2d", "al2d", "hd", "f1"):
        assert set(destination[metric]) == {"mean", "ci95"}
    assert destination["seconds"] >= 0 and destination["peak_mb"] > 50
    assert written["guidance_scale"] == 7.5 and len(written["digests"]["model"]) == 64

    command.main([*arguments, *kept])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written

    command.main(
        [*arguments, "--out", str(tmp_path / "kept"), "--task", "rectification", "--edits", "1", "--seeds", "1"]
    )
    rectified = json.loads(capsys.readouterr().out.splitlines()[-1])["methods"]["emender"]
    assert rectified["sf"] is rectified["al2d"] is None and rectified["s2d"]["ci95"] is None


def test_command_prints_errors(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([*arguments, "--edits", "3", "--out", str(tmp_path)])
    assert end.value.code == 1
    assert "edits must be from 1 to 2 in arbitrary editing, not 3" in capsys.readouterr().err


def wait_for(condition: Callable[[], bool], *, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("jobs", [1, 2])
def test_resumed_run_gives_the_same_numbers(jobs: int, arguments: list[str], tmp_path: Path) -> None:
    kept, report, whole = tmp_path / "kept", tmp_path / "report.json", tmp_path / "whole.json"
    arguments = [*arguments, "--seeds", "2", "--methods", "destination", "emender"]
    interrupted = [*arguments, "--out", str(kept), "--json", str(report)]
    first = subprocess.Popen([sys.executable, "-m", "editing.evaluation", *interrupted, "--jobs", str(jobs)], cwd=ROOT)
    try:
        wait_for(lambda: any(kept.glob("*.json")))
        children = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.kill()
        first.wait()
    assert len(children) >= jobs - 1
    wait_for(lambda: not any(child.is_running() for child in children))
    done = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    assert 1 <= len(done) < 6 and not report.exists()

    command.main(interrupted)
    assert {path: path.stat().st_mtime_ns for path in done} == done  # stored units were not measured again
    command.main([*arguments, "--out", str(tmp_path / "other"), "--json", str(whole)])
    assert read_numbers(report) == read_numbers(whole)


def read_numbers(report: Path) -> Any:
    """Return a report without its times and memory."""
    written = json.loads(report.read_text())
    for method in written["methods"].values():
        del method["seconds"], method["peak_mb"]
    return written
