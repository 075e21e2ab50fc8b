"""The difference of two weight files, in each dtype that models have."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from editing.changes import find_changed_tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_changed_tensors_have_their_relative_norm(tmp_path: Path, dtype: torch.dtype) -> None:
    before = {name: torch.randn(3, 5).to(dtype) for name in ("layers.10.a", "layers.9.a", "same")}
    after = before | {name: before[name] + torch.ones(3, 5, dtype=dtype) for name in ("layers.10.a", "layers.9.a")}
    save_file(before, tmp_path / "before.safetensors", metadata={"format": "pt"})
    save_file({f"text_model.{name}": tensor for name, tensor in after.items()}, tmp_path / "after.safetensors")
    found = find_changed_tensors(tmp_path / "after.safetensors", tmp_path / "before.safetensors")
    changes = {change.tensor: change.relative_norm for change in found}
    assert list(changes) == ["text_model.layers.9.a", "text_model.layers.10.a"]
    for name, norm in changes.items():
        old, new = (tensors[name.removeprefix("text_model.")].double() for tensors in (before, after))
        assert norm == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-6)
