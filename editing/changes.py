"""Compare two files of weights tensor by tensor. Free of torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from editing.files import read_safetensors_header

_LAYER = re.compile(r"(?:^|\.)(?:layers|block)\.(\d+)\.")


@dataclass(frozen=True)
class TensorChange:
    """A tensor that differs between two files."""

    tensor: str
    """Its key."""
    layer: int | None
    """The layer of a text encoder that it belongs to."""
    relative_norm: float
    """‖W - W_against‖ / ‖W_against‖"""


def find_changed_tensors(path: Path, against: Path) -> Iterator[TensorChange]:
    """Yield each tensor that differs between two safetensors files.

    Keys are compared without the prefix `text_model.`, which some base files lack.
    """
    one, two = _map_tensors(path), _map_tensors(against)
    names = {key.removeprefix("text_model."): key for key in two}
    for key in sorted(one, key=_natural_order):
        (dtype, w), (other_dtype, v) = one[key], two.get(names.get(key.removeprefix("text_model."), ""), one[key])
        if dtype == other_dtype and np.array_equal(w, v):
            continue
        w, v = _read_floats(w, dtype), _read_floats(v, other_dtype)
        layer = _LAYER.search(key)
        norm = float(np.linalg.norm(w - v) / max(float(np.linalg.norm(v)), 1e-300))
        yield TensorChange(key, int(layer[1]) if layer else None, norm)


def _map_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return the dtype and the bytes of each tensor in a safetensors file. They are read when they are used."""
    with path.open("rb") as file:
        header, start = read_safetensors_header(file)
    content = np.memmap(path, mode="r")
    return {
        key: (entry["dtype"], content[start:][slice(*entry["data_offsets"])])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _read_floats(content: np.ndarray, dtype: str) -> np.ndarray:
    """Return a tensor's numbers as float64. numpy has no bfloat16: it is the upper half of a float32."""
    if dtype == "BF16":
        return (content.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return content.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def _natural_order(key: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
