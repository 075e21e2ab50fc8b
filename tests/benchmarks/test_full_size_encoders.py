"""The benchmark runs at a tiny size, agrees with the plain implementation, and says so where it does not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import full_size_encoders

pytestmark = pytest.mark.slow

TINY: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    **dict.fromkeys(
        ("t5-xxl", "t5-xxl-padded"), {"d_model": 48, "d_ff": 96, "num_layers": 21, "num_heads": 4, "d_kv": 16}
    ),
}


@pytest.fixture(autouse=True)
def _tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in TINY.items():
        size = full_size_encoders.SIZES[name]
        monkeypatch.setitem(full_size_encoders.SIZES, name, replace(size, config={**size.config, **sizes}))


def test_one_command_gives_a_table_a_file_and_a_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert full_size_encoders.main(["--edits", "5", "--encoder", *TINY, "--json", str(tmp_path / "figures.json")]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads((tmp_path / "figures.json").read_text())
    assert "Stage II at full size" in printed
    assert [row["layers"] for row in last["rows"]] == [[2, 3, 4], [1, 2, 3], [1, 2, 3]]
    for row in last["rows"]:
        assert 0 < row["difference"] <= full_size_encoders.TOLERANCE
        assert row["ours"]["cpu_seconds"] > 0 and row["ours"]["peak_bytes"] > 0


def test_fails_where_the_two_differ_or_memory_exceeds_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_size_encoders, "MEMORY_LIMIT", 2**20)
    monkeypatch.setattr(full_size_encoders, "TOLERANCE", 0.0)
    assert full_size_encoders.main(["--edits", "2", "--layers", "1", "--encoder", "t5-xxl"]) == 1
    printed = capsys.readouterr().err
    assert "differ by more than" in printed and "more memory than" in printed
