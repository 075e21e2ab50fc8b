"""Check a model's folder before anything in it is opened: kinds of files, sizes, and the bounds of configurations.

Free of torch.
"""

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from editing.errors import UnsupportedPipeline

MAX_ENTRIES = 10_000
MAX_CONFIG_BYTES = 4 << 20
MAX_TEXT_BYTES = 128 << 20
"""Of vocabularies and indices, which have a line for each token or weight."""
MAX_DEPTH = 32
MAX_LAYERS = 512
MAX_WIDTH = 1 << 17
MAX_NUMBER = 1e12
CONFIGS = (
    "model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json", "added_tokens.json",
    "special_tokens_map.json", "preprocessor_config.json", "generation_config.json",
)  # fmt: skip
_TEXT = {".json", ".txt", ".jinja", ".model", ".md"}
_LAYERS = re.compile(r"(layers?(_per_block|_units)?|blocks|depth|num_res_blocks)$")
_WIDTHS = re.compile(r"(hidden_size|intermediate_size|dims?|channels|d_model|d_ff|d_kv|width)$")


def check_folder(folder: Path) -> None:
    """Raise `UnsupportedPipeline` for a folder with an entry that must not be opened, or a setting out of bounds."""
    entries = 0
    for path in folder.rglob("*"):
        entries += 1
        if entries > MAX_ENTRIES:
            raise UnsupportedPipeline(f"the folder has more than {MAX_ENTRIES} entries: it is no pipeline")
        _check_entry(path, path.relative_to(folder).as_posix())
    for path in _list_configs(folder):
        _check_config(path, path.relative_to(folder).as_posix())


def _check_entry(path: Path, name: str) -> None:
    try:
        found = path.stat()  # of what a link leads to
    except OSError as error:
        raise UnsupportedPipeline(f"{name} cannot be read: {error.strerror or 'a link to itself'}") from error
    if stat.S_ISDIR(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        raise UnsupportedPipeline(f"{name} is no regular file: remove it")
    if path.name == "adapter_config.json":
        raise UnsupportedPipeline(f"{name}: an adapter cannot be edited; merge it into the weights, or remove it")
    limit = MAX_CONFIG_BYTES if path.name in CONFIGS else MAX_TEXT_BYTES
    if path.suffix in _TEXT and found.st_size > limit:
        raise UnsupportedPipeline(f"{name} has {found.st_size} bytes: at most {limit} are read")


def _list_configs(folder: Path) -> Iterator[Path]:
    for path in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        if path.name in CONFIGS:
            yield path


def _check_config(path: Path, name: str) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise UnsupportedPipeline(f"{name} is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise UnsupportedPipeline(f"{name} is no JSON file") from error
    for key, value, depth in _walk(content):
        if depth > MAX_DEPTH:
            raise UnsupportedPipeline(f"{name} is nested more than {MAX_DEPTH} deep")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(key, value, name)
        if key in {"attn_implementation", "_attn_implementation"} and "/" in str(value):
            raise UnsupportedPipeline(f"{name} sets {key} to {value!r}, which is code of a repository: remove it")
        if key == "quantization_config" and value:
            raise UnsupportedPipeline(
                f"{name} has a quantization_config: quantized weights cannot be edited; register the model in float32, "
                "float16 or bfloat16"
            )


def _walk(content: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield each value with its key and its depth, without recursion."""
    stack: list[tuple[str, Any, int]] = [("", content, 0)]
    while stack:
        key, value, depth = stack.pop()
        yield key, value, depth
        if depth > MAX_DEPTH:
            continue
        if isinstance(value, dict):
            stack += [(str(name), each, depth + 1) for name, each in value.items()]
        elif isinstance(value, list):
            stack += [(key, each, depth + 1) for each in value]


def _check_number(key: str, value: float, name: str) -> None:
    if name.rpartition("/")[2] != "config.json":
        return  # tokenizers without a length have one of 10^30, and some schedulers a bound of -infinity
    if not math.isfinite(value):
        raise UnsupportedPipeline(f"{name} sets {key} to {value}: it must be a finite number")
    limit = MAX_LAYERS if _LAYERS.search(key) else MAX_WIDTH if _WIDTHS.search(key) else MAX_NUMBER
    if abs(value) > limit:
        raise UnsupportedPipeline(f"{name} sets {key} to {value:.12g}: at most {limit:.12g} can be used")
