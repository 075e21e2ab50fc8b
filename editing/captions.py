"""Read captions from a file: text, CSV and TSV, JSON, JSON lines, parquet. Does not need torch."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from editing.edits import has_lone_surrogate
from editing.errors import CaptionsUnreadable

COLUMNS = ("caption", "text")
"""The columns that are read if none is named, in order of preference."""

Items = Iterator[tuple[str, Any]]
"""Places ("line 3") with the values found there."""


def read_captions(path: str | Path, column: str | None = None) -> Iterator[str]:
    """Yield the captions of a file in order, stripped; blank ones are skipped.

    The suffix names the format: `.txt` (one caption a line), `.csv` and `.tsv` (with a header), `.json` (a list of
    strings or objects), `.jsonl` and `.ndjson` (a string or an object a line), `.parquet` (needs the extra `captions`).
    `column` names the column or key; the default is `caption`, else `text`. All but `.json` are streamed. UTF-8 only.

    Raises `CaptionsUnreadable`, with the line or row: at once for an unknown suffix, else on the way.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise CaptionsUnreadable(f"{path.name} is not one of {', '.join(_READERS)}: rename or convert it")
    return _check(path, read(path, column))


def _check(path: Path, items: Items) -> Iterator[str]:
    try:
        for place, caption in items:
            if not isinstance(caption, str):
                raise _unreadable(path, f"a caption must be text, not {_type_name(caption)}", place)
            if "\0" in caption:
                raise _unreadable(path, "a caption must not contain a NUL character", place)
            if has_lone_surrogate(caption):
                raise _unreadable(path, "a caption must be valid UTF-8", place)
            if caption := caption.strip():
                yield caption
    except OSError as error:
        raise CaptionsUnreadable(f"{path.name} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, column: str | None) -> Items:
    if column is not None:
        raise _unreadable(path, "a text file has no columns: leave the column out")
    yield from _read_lines(path)


def _read_table(path: Path, column: str | None, *, delimiter: str) -> Items:
    with _open(path) as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            column = _choose_column(path, column, rows.fieldnames or ())
            for row in rows:
                if row[column] is None:
                    raise _unreadable(path, f"the row is too short: it has no {column!r}", f"line {rows.line_num}")
                yield f"line {rows.line_num}", row[column]
        except csv.Error as error:
            raise _unreadable(path, f"is not valid CSV: {error}", f"line {rows.reader.line_num}") from error


def _read_json(path: Path, column: str | None) -> Items:
    with _open(path) as file:
        try:
            items = json.load(file)
        except ValueError as error:
            raise _unreadable(path, f"is not valid JSON: {error}") from error
    if not isinstance(items, list):
        raise _unreadable(path, f"must contain a list of captions, not {_type_name(items)}")
    for place, item in _number("item", items):
        yield place, _get_caption(path, item, column, place)


def _read_json_lines(path: Path, column: str | None) -> Items:
    for place, line in _read_lines(path):
        if line.strip():
            try:
                item = json.loads(line)
            except ValueError as error:
                raise _unreadable(path, f"is not valid JSON: {error}", place) from error
            yield place, _get_caption(path, item, column, place)


def _read_parquet(path: Path, column: str | None) -> Items:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise _unreadable(path, "parquet needs pyarrow: pip install 'emender-service[captions]'") from None
    try:
        with ParquetFile(path) as file:
            column = _choose_column(path, column, file.schema_arrow.names)
            batches = file.iter_batches(columns=[column])
            # A null counts as a blank caption.
            values = ("" if value is None else value for batch in batches for value in batch.column(0).to_pylist())
            yield from _number("row", values)
    except (ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, f"is not a valid parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, str | None], Items]] = {
    ".txt": _read_text,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


def _open(path: Path) -> IO[str]:
    # `surrogateescape` keeps invalid bytes, so that the caption with them is found and its line named.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_lines(path: Path) -> Items:
    with _open(path) as file:
        yield from _number("line", file)


def _number(unit: str, values: Iterable[Any]) -> Items:
    return ((f"{unit} {number}", value) for number, value in enumerate(values, start=1))


def _get_caption(path: Path, item: Any, column: str | None, place: str) -> Any:
    """Return a JSON item itself, or the value of its key `column` if it is an object."""
    return item[_choose_column(path, column, item, place)] if isinstance(item, dict) else item


def _choose_column(path: Path, column: str | None, names: Iterable[str], place: str = "") -> str:
    wanted = COLUMNS if column is None else (column,)
    for candidate in wanted:
        if candidate in names:
            return candidate
    found = ", ".join(names) or "none"
    missing = " or ".join(map(repr, wanted))
    raise _unreadable(path, f"there is no column {missing}: there is {found}; name the column to read", place)


def _unreadable(path: Path, detail: str, place: str = "") -> CaptionsUnreadable:
    return CaptionsUnreadable(f"{path.name}, {place}: {detail}" if place else f"{path.name}: {detail}")


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
