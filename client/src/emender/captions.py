"""Read captions from a file: lines, tables, JSON, parquet. `editing.captions` is a link to it."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .errors import CaptionsUnreadable
from .tables import DELIMITERS, TableError, open_text, read_table, split_names

COLUMNS = ("caption", "text")
"""The columns that are read if none is named, in order of preference."""

Items = Iterator[tuple[str, Any]]
"""Places ("line 3") with the values found there."""


def read_captions(path: str | Path, column: str | None = None) -> Iterator[str]:
    """Yield the captions of a file in order, stripped; blank ones are skipped.

    The suffix names the format: `.txt` (one caption a line, or a table), `.csv` and `.tsv` (with a header, or caption
    and URL as in CC3M), `.json`, `.jsonl` and `.ndjson` (a string or an object a line), `.parquet` (needs pyarrow).
    JSON is a list of strings or objects, COCO's captions, or Karpathy's splits. An object may have a list of captions.
    `column` names the column or key in any case; the default is `caption`, else `text`. All but `.json` are streamed.
    UTF-8, or UTF-16 with a byte-order mark.

    Raises `CaptionsUnreadable`, with the line or row: at once for an unknown suffix, else on the way.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise CaptionsUnreadable(f"{path.name} is not one of {', '.join(_READERS)}: rename or convert it")
    return _check(path, read(path, column))


def _check(path: Path, items: Items) -> Iterator[str]:
    try:
        for place, value in items:
            for caption in value if isinstance(value, list) else [value]:
                if not isinstance(caption, str):
                    raise _unreadable(path, f"a caption must be text, not {_type_name(caption)}", place)
                if "\0" in caption:
                    raise _unreadable(path, "a caption must not contain a NUL character", place)
                if not _is_unicode(caption):
                    raise _unreadable(path, "a caption must be valid UTF-8: save the file as UTF-8", place)
                if caption := caption.strip():
                    yield caption
    except TableError as error:
        raise _unreadable(path, error.detail, f"line {error.line}") from None
    except UnicodeDecodeError:
        raise _unreadable(path, "is not valid UTF-16: save it as UTF-8") from None
    except OSError as error:
        raise CaptionsUnreadable(f"{path.name} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, column: str | None) -> Items:
    with open_text(path) as file:
        first = file.readline()
    names = max((split_names(first, delimiter) for delimiter in DELIMITERS), key=len)
    if len(names) > 1 and {column, *COLUMNS} & {*names} and all(name.isidentifier() for name in names):
        yield from _read_table(path, column)
        return
    if column is not None:
        raise _unreadable(path, "a text file has no columns: leave the column out")
    yield from _read_lines(path)


def _read_table(path: Path, column: str | None, *, default: str = ",") -> Items:
    with open_text(path) as file:
        first = file.readline()
        file.seek(0)
        if column is None and (index := _find_caption_beside_url(first)) is not None:
            for place, line in _number("line", file):
                cells = line.rstrip("\r\n").split("\t")
                if line.strip():
                    if len(cells) <= index:
                        raise _unreadable(path, "the row is too short: it has no caption", place)
                    yield place, cells[index]
            return
        name = None
        for line, row in read_table(file, columns=COLUMNS if column is None else (column,), default=default):
            name = name or _choose_column(path, column, row, f"line {line}")
            if row[name] is None:
                raise _unreadable(path, f"the row is too short: it has no {name!r}", f"line {line}")
            yield f"line {line}", row[name]


def _find_caption_beside_url(first: str) -> int | None:
    """Return the index of the caption in tab-separated lines of captions and URLs: CC3M and CC12M have no header."""
    urls = [cell.startswith(("http://", "https://")) for cell in first.rstrip("\r\n").split("\t")]
    return urls.index(False) if True in urls and False in urls else None


def _read_json(path: Path, column: str | None) -> Items:
    with open_text(path) as file:
        try:
            items = json.load(file)
        except json.JSONDecodeError as error:
            raise _unreadable(path, f"is not valid JSON: {error.msg}", f"line {error.lineno}") from None
        except (ValueError, RecursionError):
            raise _unreadable(path, "is not valid JSON") from None
    if isinstance(items, dict):
        lists = [items[key] for key in ("annotations", "images") if isinstance(items.get(key), list)]
        if not lists:
            detail = "must contain a list of captions, COCO's captions or Karpathy's splits, not another object"
            raise _unreadable(path, detail)
        items = lists[0]
    if not isinstance(items, list):
        raise _unreadable(path, f"must contain a list of captions, not {_type_name(items)}")
    for place, item in _number("item", items):
        yield place, _get_caption(path, item, column, place)


def _read_json_lines(path: Path, column: str | None) -> Items:
    for place, line in _read_lines(path):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _unreadable(
                    path, f"is not valid JSON: {getattr(error, 'msg', 'nested too deeply')}", place
                ) from None
            yield place, _get_caption(path, item, column, place)


def _read_parquet(path: Path, column: str | None) -> Items:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise _unreadable(path, "parquet needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            column = _choose_column(path, column, file.schema_arrow.names)
            batches = file.iter_batches(columns=[column])
            # A null counts as a blank caption.
            values = ("" if value is None else value for batch in batches for value in batch.column(0).to_pylist())
            yield from _number("row", values)
    except (ArrowException, UnicodeDecodeError):
        raise _unreadable(path, "is not a valid parquet file") from None


_READERS: dict[str, Callable[[Path, str | None], Items]] = {
    ".txt": _read_text,
    ".csv": _read_table,
    ".tsv": partial(_read_table, default="\t"),
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


def _read_lines(path: Path) -> Items:
    with open_text(path) as file:
        yield from _number("line", file)


def _number(unit: str, values: Iterable[Any]) -> Items:
    return ((f"{unit} {number}", value) for number, value in enumerate(values, start=1))


def _get_caption(path: Path, item: Any, column: str | None, place: str) -> Any:
    """Return a JSON item itself, or what an object has: its key `column`, or the sentences of a Karpathy split."""
    if not isinstance(item, dict):
        return item
    if column is None and isinstance(sentences := item.get("sentences"), list):
        return [each.get("raw") if isinstance(each, dict) else each for each in sentences]
    return item[_choose_column(path, column, item, place)]


def _choose_column(path: Path, column: str | None, names: Iterable[str], place: str = "") -> str:
    wanted = COLUMNS if column is None else (column,)
    by_folded = {name.strip().casefold(): name for name in names}
    for candidate in wanted:
        if candidate in by_folded.values():
            return candidate
        if candidate.casefold() in by_folded:
            return by_folded[candidate.casefold()]
    found = ", ".join(by_folded.values()) or "none"
    missing = " or ".join(map(repr, wanted))
    raise _unreadable(path, f"there is no column {missing}: there is {found}; name the column to read", place)


def _unreadable(path: Path, detail: str, place: str = "") -> CaptionsUnreadable:
    return CaptionsUnreadable(f"{path.name}, {place}: {detail}" if place else f"{path.name}: {detail}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
