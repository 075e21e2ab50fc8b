"""The benchmark of statistics at a tiny size: it runs, agrees with the plain way, and says so where it does not."""

import json
from pathlib import Path

import pytest

from benchmarks import statistics

pytestmark = pytest.mark.slow

TINY = ["--captions", "80", "--width", "32", "--mlp-width", "64", "--layers", "3"]


def test_both_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert statistics.main([*TINY, "--json", str(tmp_path / "figures.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "figures.json").read_text())
    assert (result["captions"], result["layers"]) == (80, 2)
    assert 0 < result["difference"] < 1e-5
    assert result["ratio"] == result["plain"]["cpu_seconds"] / result["ours"]["cpu_seconds"]


def test_a_difference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "difference", lambda _: 2e-4)
    monkeypatch.setattr(
        statistics, "run_child", lambda *_: {"cpu_seconds": 1, "wall_seconds": 1, "peak_bytes_over_model": 0}
    )
    assert statistics.main(TINY) == 1
