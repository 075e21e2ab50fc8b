"""Captions out of a file, one by one: text, CSV and TSV, JSON, JSON lines, parquet. Free of torch."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from editing.edits import has_half_a_pair
from editing.errors import CaptionsUnreadable

COLUMNS = ("caption", "text")
"""Where the captions of a table are looked for, unless a column is named."""

Numbered = Iterator[tuple[str, Any]]
"""Where something stands ("line 3"), and what stands there."""


def read_captions(path: str | Path, column: str | None = None) -> Iterator[str]:
    """The captions in a file, stripped and in its order; blank ones are left out.

    The name's suffix says what it is: `.txt` (one a line), `.csv` and `.tsv` (a first line of column names), `.json` (a
    list of strings or of objects), `.jsonl` and `.ndjson` (one of these a line), `.parquet` (with the extra
    `captions`). `column` names the column or key; by default it is `caption`, else `text`. Everything but `.json` is
    streamed. Text is UTF-8.

    Raises `CaptionsUnreadable` with the line or row: at once for a suffix that is not known, else on the way.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise CaptionsUnreadable(f"{path.name} is not one of {', '.join(_READERS)}: rename or convert it")
    return _captions(path, read(path, column))


class _Wrong(Exception):
    """What is wrong, and at which place of the file, if at one."""

    def __init__(self, detail: str, *, place: str = "") -> None:
        super().__init__(detail)
        self.place = place


def _captions(path: Path, items: Numbered) -> Iterator[str]:
    try:
        for place, caption in items:
            if not isinstance(caption, str):
                raise _Wrong(f"a caption must be text, not {_kind(caption)}", place=place)
            if "\0" in caption:
                raise _Wrong("a caption must not hold a NUL character", place=place)
            if has_half_a_pair(caption):
                raise _Wrong("a caption must be UTF-8 without halves of surrogate pairs", place=place)
            if caption := caption.strip():
                yield caption
    except _Wrong as wrong:
        where = f"{path.name}, {wrong.place}" if wrong.place else path.name
        raise CaptionsUnreadable(f"{where}: {wrong}") from wrong.__cause__
    except OSError as error:
        raise CaptionsUnreadable(f"{path.name} cannot be read: {error.strerror or error}") from error


def _text(path: Path, column: str | None) -> Numbered:
    if column is not None:
        raise _Wrong("a text file has no columns: leave the column out")
    yield from _lines(path)


def _table(path: Path, column: str | None, *, delimiter: str) -> Numbered:
    with _open(path) as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            chosen = _choose(column, rows.fieldnames or ())
            for row in rows:
                place = f"line {rows.line_num}"
                if row[chosen] is None:
                    raise _Wrong(f"the row is too short: it has no {chosen!r}", place=place)
                yield place, row[chosen]
        except csv.Error as error:
            raise _Wrong(f"is no CSV: {error}", place=f"line {rows.reader.line_num}") from error


def _csv(path: Path, column: str | None) -> Numbered:
    return _table(path, column, delimiter=",")


def _tsv(path: Path, column: str | None) -> Numbered:
    return _table(path, column, delimiter="\t")


def _json(path: Path, column: str | None) -> Numbered:
    with _open(path) as file:
        try:
            items = json.load(file)
        except ValueError as error:
            raise _Wrong(f"is no JSON: {error}") from error
    if not isinstance(items, list):
        raise _Wrong(f"must hold a list of captions, not {_kind(items)}")
    yield from ((place, _of(item, column, place)) for place, item in _numbered("item", items))


def _json_lines(path: Path, column: str | None) -> Numbered:
    for place, line in _lines(path):
        if line.strip():
            try:
                item = json.loads(line)
            except ValueError as error:
                raise _Wrong(f"is no JSON: {error}", place=place) from error
            yield place, _of(item, column, place)


def _parquet(path: Path, column: str | None) -> Numbered:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise _Wrong("reading parquet needs pyarrow: pip install 'emender[captions]'") from None
    try:
        with ParquetFile(path) as file:
            chosen = _choose(column, file.schema_arrow.names)
            batches = file.iter_batches(columns=[chosen])
            # A null is a caption that is missing, as an empty one is.
            values = ("" if value is None else value for batch in batches for value in batch.column(0).to_pylist())
            yield from _numbered("row", values)
    except (ArrowException, UnicodeDecodeError) as error:
        raise _Wrong(f"is no parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, str | None], Numbered]] = {
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}


def _open(path: Path) -> Any:
    """Bytes that are no UTF-8 come as halves of surrogate pairs, so that the caption with them is found and named."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(path: Path) -> Numbered:
    with _open(path) as file:
        yield from _numbered("line", file)


def _numbered(what: str, items: Iterable[Any]) -> Numbered:
    return ((f"{what} {number}", item) for number, item in enumerate(items, start=1))


def _of(item: Any, column: str | None, place: str) -> Any:
    """The caption of a JSON item: the item itself, or what an object has under the column's name."""
    if not isinstance(item, dict):
        return item
    try:
        return item[_choose(column, item)]
    except _Wrong as wrong:
        raise _Wrong(str(wrong), place=place) from None


def _choose(column: str | None, names: Iterable[str]) -> str:
    names = list(names)
    for candidate in COLUMNS if column is None else (column,):
        if candidate in names:
            return candidate
    wanted = " or ".join(repr(name) for name in COLUMNS) if column is None else repr(column)
    raise _Wrong(f"there is no column {wanted}: there is {', '.join(names) or 'none'}; name the one to read")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
