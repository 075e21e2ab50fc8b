"""Captions from a file, for `emender statistics create`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = ("caption", "text")
"""The columns that are read by default, in order of preference."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".txt", *DELIMITERS, ".json", ".jsonl", ".ndjson", ".parquet")


def read_captions(path: Path, column: str | None = None) -> Iterator[str]:
    """Iterate over the captions of a file that are not blank, stripped.

    The suffix names the format: `.txt` has one caption per line, `.csv` and `.tsv` have a header, `.json` is a list of
    strings or objects, `.jsonl` and `.ndjson` have one of those per line, `.parquet` needs pyarrow. Raises `ValueError`
    with the name of the file and the line or row.
    """
    number = 1
    try:
        for item in _read_items(path, column):
            caption = _find_caption(item, column) if isinstance(item, dict) else item
            if not isinstance(caption, str):
                raise ValueError("a caption must be text")
            if "\0" in caption:
                raise ValueError("a caption must not contain a NUL character")
            if caption := caption.strip():
                yield caption
            number += 1
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8 after caption {number - 1}.") from None
    except (ValueError, csv.Error, LookupError) as error:
        raise ValueError(f"{path.name}, caption {number}: {error}.") from error


def _read_items(path: Path, column: str | None) -> Iterator[Any]:
    """Iterate over the lines, rows or items of a file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, column)
        return
    if suffix not in SUFFIXES:
        raise ValueError(f"the suffix must be one of {', '.join(SUFFIXES)}")
    with path.open(encoding="utf-8-sig", newline="" if suffix in DELIMITERS else None) as file:
        if suffix in DELIMITERS:
            yield from csv.DictReader(file, delimiter=DELIMITERS[suffix], strict=True)
        elif suffix == ".json":
            items = json.load(file)
            if not isinstance(items, list):
                raise ValueError("the file must contain a list")
            yield from items
        elif suffix == ".txt":
            yield from file
        else:
            yield from (json.loads(line) for line in file if line.strip())


def _read_parquet(path: Path, column: str | None) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("parquet needs pyarrow: pip install pyarrow") from None
    with ParquetFile(path) as file:
        name = _choose_column(file.schema_arrow.names, column)
        for batch in file.iter_batches(columns=[name]):
            yield from (caption or "" for caption in batch.column(0).to_pylist())


def _find_caption(item: dict[str, Any], column: str | None) -> Any:
    return item[_choose_column(list(item), column)]


def _choose_column(names: list[str], column: str | None) -> str:
    wanted = (column,) if column else COLUMNS
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"there is no column {' or '.join(map(repr, wanted))}; the columns are {', '.join(names)}")
