"""The benchmark runs at a tiny size on the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import full_size_generators
from tests.benchmarks.test_full_size_encoders import TINY

pytestmark = pytest.mark.slow

AUTOENCODER = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TRANSFORMER = {
    "in_channels": 4,
    "dim": 16,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [2, 2, 4],
    "axes_lens": [1024, 32, 32],
}


def test_one_command_gives_a_table_a_file_and_a_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = full_size_generators.PIPELINES
    small: dict[str, Any] = {"autoencoder": AUTOENCODER, "image": 16}
    qwen = {**sizes["z-image"].text, **TINY["qwen3-4b"]}
    monkeypatch.setitem(sizes, "sd1.5", replace(sizes["sd1.5"], text=TEXT, network=UNET, concepts=(1, 2), **small))
    monkeypatch.setitem(sizes, "z-image", replace(sizes["z-image"], text=qwen, network=TRANSFORMER, **small))
    file = tmp_path / "figures.json"
    assert full_size_generators.main(["--device", "cpu", "--steps", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads(file.read_text())
    assert "Hybrid edits at full size" in printed
    found = [(row["pipeline"], row["weights"], row["concepts"]) for row in last["rows"]]
    assert found == [
        ("sd1.5", "bfloat16", 1),
        ("sd1.5", "bfloat16", 2),
        ("sd1.5", "autocast", 1),
        ("z-image", "bfloat16", 1),
    ]
    assert all(0 < row["step_seconds"] < row["seconds"] for row in last["rows"])
