"""The demo's promises: each broken one is found."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from demo.check import failures, main

KEPT: dict[str, Any] = {
    "edits": [
        *(
            {
                "source": f"source {index}",
                "destination": f"destination {index}",
                "before": {"source": 0.9, "destination": 0.0},
                "after": {"source": 0.0, "destination": 0.9},
            }
            for index in range(11)
        ),
        {
            "source": "style",
            "destination": None,
            "before": {"source": 0.95, "destination": None},
            "after": {"source": 0.3, "destination": None},
        },
    ],
    "holdout": {"before": 0.97, "after": 0.95},
    "checkpoint": {"version": "v1", "sha256": "ab"},
    "pulled": {"sha256": "ab", "with": "emender-client"},
}


@pytest.fixture
def report() -> dict[str, Any]:
    return copy.deepcopy(KEPT)


def test_kept(report: dict[str, Any]) -> None:
    assert failures(report) == {}


def break_edits(report: dict[str, Any]) -> None:
    del report["edits"][0]


def break_destinations(report: dict[str, Any]) -> None:
    for edit in report["edits"][:11]:
        edit["after"]["destination"] = 0.69


def break_erasure(report: dict[str, Any]) -> None:
    report["edits"][-1]["after"]["source"] = 0.46


def break_holdout(report: dict[str, Any]) -> None:
    report["holdout"]["after"] = 0.91


def break_pull(report: dict[str, Any]) -> None:
    report["pulled"]["sha256"] = "cd"


@pytest.mark.parametrize("breaking", [break_edits, break_destinations, break_erasure, break_holdout, break_pull])
def test_broken(report: dict[str, Any], breaking: Any) -> None:
    breaking(report)
    name = breaking.__name__.removeprefix("break_")
    assert list(failures(report)) == [name]


@pytest.mark.parametrize(
    ("erased", "code", "line"), [(0.3, 0, "what it promises"), (0.9, 1, "BROKEN: the erased style")]
)
def test_the_command(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], erased: float, code: int, line: str
) -> None:
    report["edits"][-1]["after"]["source"] = erased
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main([str(tmp_path / "report.json")]) == code
    assert line in capsys.readouterr().out
