"""The commands as they are typed, on random pipelines: tables, reports, and what is said of bad input."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from editing.evaluation.__main__ import main
from editing.families.layout import describe_pipeline
from tests.editing.evaluation.test_gender import DOCTOR, HEADER
from tests.editing.evaluation.test_timed import COLUMNS

Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def edited(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pipeline whose text encoder says the opposite."""
    copy = tmp_path_factory.mktemp("edited") / "pipeline"
    for path in folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    weights = load_file(copy / "text_encoder" / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("final_layer_norm.weight")]
    save_file(weights | {name: -weights[name]}, copy / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture
def run(folder: Path, edited: Path, clip_folder: Path, tmp_path: Path) -> Command:
    def run(command: str, data: str, *options: str, model: Path = edited, name: str = "data.csv") -> dict[str, Any]:
        (tmp_path / name).write_text(data, encoding="utf-8")
        arguments = [
            "--model",
            str(model),
            "--base",
            str(folder),
            "--clip",
            str(clip_folder),
            "--num-inference-steps",
            "2",
        ]
        report = tmp_path / "report.json"
        main([command, *arguments, "--data", str(tmp_path / name), "--json", str(report), *options])
        return json.loads(report.read_text(encoding="utf-8"))

    return run


def timed(rows: int) -> str:
    lines = [",".join(f"the {column} {row}" for column in COLUMNS) for row in range(rows)]
    return "\n".join([",".join(COLUMNS), *lines]) + "\n"


class TestTimed:
    def test_report_has_rows_settings_and_notes(
        self, run: Command, folder: Path, edited: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = run("timed", timed(2), "--seeds", "2", "--guidance-scale", "3")
        assert list(report["rows"]) == ["base", "destination", "edited"]
        for row in report["rows"].values():
            assert list(row) == ["efficacy", "generality", "specificity", "f1_harmonic", "f1_arithmetic"]
            assert 0 <= row["generality"]["mean"] <= 1
            assert row["f1_arithmetic"]["mean"] == pytest.approx(
                (row["generality"]["mean"] + row["specificity"]["mean"]) / 2
            )
        settings = report["settings"]
        assert (settings["tasks"], settings["seeds"], settings["num_inference_steps"], settings["guidance_scale"]) == (
            2,
            [0, 1],
            2,
            3.0,
        )
        assert settings["digests"] == {
            "base": describe_pipeline(folder).digest, "edited": describe_pipeline(edited).digest,
        }  # fmt: skip
        assert settings["versions"]["torch"] == torch.__version__
        assert settings["seconds"] > 0 and settings["peak_mb"] > 0
        assert "NSFW" in report["limits"]
        printed = capsys.readouterr().out
        assert "f1_harmonic" in printed and "destination" in printed

    def test_unedited_model_scores_as_its_base(self, run: Command, folder: Path) -> None:
        report = run("timed", timed(3), "--seeds", "1", "--limit", "2", model=folder)
        assert report["settings"]["tasks"] == 2
        assert report["rows"]["edited"] == report["rows"]["base"]

    def test_error_is_printed(self, run: Command, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run("timed", timed(1) + "\n,")
        assert "data.csv, line 4: 'old' is blank" in capsys.readouterr().err


def test_gender(run: Command) -> None:
    report = run("gender", HEADER + DOCTOR, "--pictures", "6", "--seeds", "2")
    for title in ("base", "edited"):
        shares = [each["a doctor"] for each in report["details"]["female_shares"][title]]
        assert len(shares) == 2
        assert report["rows"][title]["delta"]["mean"] == pytest.approx(
            sum(abs(100 * share - 50) / 50 for share in shares) / 2
        )
    assert (report["settings"]["pictures"], report["settings"]["runs"]) == (6, 2)


def test_artists(run: Command) -> None:
    items = [{"class name": f"artist {n // 2}", "text prompt": "art of {}", "random seed": n} for n in range(4)]
    report = run("artists", json.dumps(items), name="artists.json")
    assert list(report["rows"]["edited"]) == ["clip", "clip_change"]
    assert set(report["details"]["base_clip"]) == {"artist 0", "artist 1"}


def test_lpips_needs_the_extra(
    run: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if it were not installed
    item = {"class name": "artist", "text prompt": "art of {}", "random seed": 0}
    with pytest.raises(SystemExit):
        run("artists", json.dumps([item]), "--lpips", "alex", name="artists.json")
    assert "pip install 'emender-service[evaluation]'" in capsys.readouterr().err


def test_preservation(run: Command) -> None:
    report = run("preservation", "a cat\na dog\na fish\n", "--limit", "2", name="captions.txt")
    assert (report["settings"]["captions"], report["settings"]["fid"]) == (2, False)
    assert list(report["rows"]["edited"]) == ["clip"]
    assert report["rows"]["edited"] != report["rows"]["base"]


def test_road_refuses_a_file_of_timed(run: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("road", timed(1))
    assert "data.csv, line 1: there is no column 'Type'" in capsys.readouterr().err
