"""The benchmark runs at a tiny size, agrees with itself, and says so where it does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import stage_two
from benchmarks.measuring import difference

pytestmark = pytest.mark.slow

TINY = ["--edits", "3", "--width", "64", "--mlp-width", "128", "--layers", "4", "--repeats", "1"]


def test_one_command_gives_a_table_a_file_and_a_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage_two.main([*TINY, "--modes", "published", "--json", str(tmp_path / "figures.json")]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads((tmp_path / "figures.json").read_text())
    assert "Stage II" in printed and "FLOP" in printed
    (row,) = last["rows"]
    assert (row["edits"], row["mode"]) == (3, "published")
    assert 0 < row["difference"] <= stage_two.TOLERANCE
    assert row["ours"]["cpu_seconds"] > 0 and row["plain"]["peak_bytes_over_model"] >= 0
    assert last["ratio"] == row["ratio"]


def test_fails_where_the_two_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = {"cpu_seconds": 1.0, "wall_seconds": 1.0, "peak_bytes_over_model": 0.0, "flop": {}, "share_of_peak": 0.5}
    row = {"edits": 3, "mode": "published", "ours": ran, "plain": ran, "ratio": 1.0, "difference": 2e-4}
    monkeypatch.setattr(stage_two, "compare", lambda *_: [row])
    assert stage_two.main(TINY) == 1
    assert "differ by more than" in capsys.readouterr().err


def test_the_difference_is_of_the_worst_layer(tmp_path: Path) -> None:
    expected = {"0": torch.eye(3), "1": torch.eye(3)}
    save_file(expected, tmp_path / "plain")
    save_file({"0": torch.eye(3), "1": 1.01 * torch.eye(3)}, tmp_path / "ours")
    assert difference(tmp_path) == pytest.approx(0.01, rel=1e-4)
