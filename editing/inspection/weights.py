"""Check the weights of a model's folder: every header, its keys, shapes and dtypes, and a sample of the values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.families.layout import list_parts, read_index
from editing.files import read_safetensors_header

SAMPLED_BYTES = 256 << 20
"""Values are read of a model, at most. A smaller one is read whole."""
MAX_HEADER_BYTES = 32 << 20
_CHUNK = 1 << 16
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    """As in the header: "F32", "BF16" …"""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""

    @property
    def name(self) -> str:
        """The file's name with that of its component."""
        return f"{self.file.parent.name}/{self.file.name}"


def read_tensors(weights: Path) -> dict[str, StoredTensor]:
    """Read the headers of a component's weights, in one file or in several. Raises `UnsupportedPipeline`."""
    tensors: dict[str, StoredTensor] = {}
    for part in list_parts(weights):
        tensors |= read_header(part)
    if weights.suffix == ".json":
        for key, name in read_index(weights).items():
            if key not in tensors or tensors[key].file.name != name:
                raise UnsupportedPipeline(
                    f"{weights.parent.name}/{name} has no {key}, which {weights.name} names there"
                )
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file. Raises `UnsupportedPipeline`, and `UnsafePipeline` for a pickle."""
    name = f"{path.parent.name}/{path.name}"
    with path.open("rb") as file:
        begin = file.read(len(_POINTER))
        if begin == _POINTER:
            raise UnsupportedPipeline(f"{name} is a pointer of git-lfs and not the weights: run git lfs pull")
        if begin.startswith((b"PK\x03\x04", b"\x80")) and begin[8:9] != b"{":
            raise UnsafePipeline(
                f"{name} is a pickle, which can run code when opened: convert it with "
                "save_pretrained(..., safe_serialization=True)"
            )
        length = int.from_bytes(begin[:8], "little")
        size = path.stat().st_size
        if size < 8 or begin[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise UnsupportedPipeline(f"{name} is no safetensors file: download it again")
        if 8 + length > size:
            raise UnsupportedPipeline(f"{name} is cut off: {size} bytes end within its header; download it again")
        file.seek(0)
        try:
            header, start = read_safetensors_header(file)
            entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
            end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (AttributeError, KeyError, IndexError, RecursionError, TypeError, ValueError) as error:
            raise UnsupportedPipeline(f"{name} has a damaged header: download it again") from error
    if end > size:
        raise UnsupportedPipeline(f"{name} is cut off: it has {size} of {end} bytes; download it again")
    try:
        with safe_open(path, framework="pt"):  # checks offsets, shapes and dtypes against one another
            pass
    except SafetensorError as error:
        raise UnsupportedPipeline(f"{name} is damaged: {error}; download it again") from error
    return {
        key: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for key, entry in entries.items()
    }  # fmt: skip


def compare_with_network(network: Any, weights: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise `UnsupportedPipeline` if the weights are not those of a network of diffusers on the meta device."""
    stored: dict[str, Any] = dict(tensors)
    network._fix_state_dict_keys_on_load(stored)  # names of older versions
    expected: dict[str, torch.Tensor] = network.state_dict()
    component, file = weights.parent.name, f"{weights.parent.name}/{weights.name}"
    if missing := [key for key in expected if key not in stored]:
        raise UnsupportedPipeline(describe_missing(file, missing, stored))
    for key, tensor in expected.items():
        if stored[key].shape != tuple(tensor.shape):
            raise UnsupportedPipeline(describe_shape(stored[key].name, key, stored[key].shape, tensor.shape))
    check_dtypes({key: stored[key] for key, tensor in expected.items() if tensor.is_floating_point()})
    check_surplus(component, expected, stored)


def describe_missing(file: str, missing: Sequence[str], stored: Iterable[str]) -> str:
    """Return the sentence for weights that a file lacks. It names the prefix under which the file has them."""
    prefixes = sorted(key.removesuffix(missing[0]) for key in stored if key.endswith(f".{missing[0]}"))
    if prefixes:
        return f"{file} has its weights under the foreign prefix {prefixes[0]!r}: remove it from the keys"
    others = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
    return f"{file} has no {missing[0]}{others}, which config.json needs"


def describe_shape(file: str, key: str, stored: Sequence[int], expected: Sequence[int]) -> str:
    """Return the sentence for a weight of another shape than the configuration says."""
    return f"{file} has {key} in the shape {list(stored)}: config.json needs {list(expected)}"


def check_dtypes(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise `UnsupportedPipeline` for weights that are no floating-point numbers of at least 16 bits."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise UnsupportedPipeline(
                f"{tensor.name} has {key} as {tensor.dtype}: quantized weights cannot be edited; register the model in "
                "float32, float16 or bfloat16"
            )


def check_surplus(component: str, expected: Iterable[str], stored: Iterable[str]) -> None:
    """Raise `UnsupportedPipeline` for layers that the files have and the configuration does not.

    Other weights that the model does not have are ignored as its library does: a decoder beside an encoder.
    """
    known = set(expected)
    kinds = {_number(key) for key in known}
    if surplus := sorted(key for key in stored if key not in known and _number(key) in kinds):
        raise UnsupportedPipeline(f"{component}/ has the weights {surplus[0]}, but fewer layers in its config.json")


def _number(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", key)


def check_values(tensors: Sequence[tuple[str, StoredTensor]]) -> None:
    """Raise `UnsupportedPipeline` for a value that is NaN or infinite, in a sample of `SAMPLED_BYTES`."""
    total = sum(tensor.size for _, tensor in tensors)
    for key, tensor in tensors:
        if tensor.dtype not in _DTYPES:
            continue
        chunks = -(-tensor.size // _CHUNK)
        wanted = chunks if total <= SAMPLED_BYTES else max(1, chunks * SAMPLED_BYTES // total)
        with tensor.file.open("rb") as file:
            for number in range(wanted):
                start = (number * chunks // wanted) * _CHUNK
                file.seek(tensor.offset + start)
                content = bytearray(file.read(min(_CHUNK, tensor.size - start)))
                if content and not torch.frombuffer(content, dtype=_DTYPES[tensor.dtype]).isfinite().all():
                    raise UnsupportedPipeline(f"{tensor.name} has NaN or infinity in {key}")
