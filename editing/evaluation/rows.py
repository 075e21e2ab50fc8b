"""Read benchmarks' files as their authors publish them, row by row. Errors name the row; repairs are noted.

Free of torch. Rows are counted as in a text editor and in `editing.captions`: by the line of a CSV file, with the
column names on line 1, and by the item of a JSON list, from 1.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from editing.edits import has_lone_surrogate
from editing.errors import TaskUnreadable

T = TypeVar("T")


@dataclass(frozen=True)
class Note:
    """Something irregular in a file, and what was done about it."""

    place: str
    """"line 3" or "item 3"; empty for the whole file."""
    detail: str


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The tasks of a file in order, and the notes about it."""

    tasks: tuple[T, ...]
    notes: tuple[Note, ...]


class BenchmarkFile:
    """A file of a benchmark. Every method raises `TaskUnreadable` with the file's name and the row."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._notes: list[Note] = []

    def read_csv(self, columns: Sequence[str]) -> Iterator["Row"]:
        """Yield the rows of a CSV file that has at least these columns."""
        try:
            # Bytes that are not UTF-8 become lone surrogates, so that their row is found and named.
            with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                rows = csv.DictReader(file, strict=True)
                try:
                    if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
                        raise self.build_error(f"there is no column {', '.join(map(repr, missing))}", place="line 1")
                    for fields in rows:
                        place = f"line {rows.line_num}"
                        if None in fields:
                            raise self.build_error("the row has more fields than there are columns", place=place)
                        yield Row(self, place, fields)
                except csv.Error as error:
                    raise self.build_error(f"is no CSV: {error}", place=f"line {rows.reader.line_num}") from error
        except OSError as error:
            raise self.build_error(f"cannot be read: {error.strerror or error}") from error

    def read_json(self) -> Iterator["Row"]:
        """Yield the objects of a JSON list."""
        try:
            items = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise self.build_error(f"cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise self.build_error(f"is no JSON: {error}") from error
        if not isinstance(items, list):
            raise self.build_error("must be a list of objects")
        for number, item in enumerate(items, start=1):
            place = f"item {number}"
            if not isinstance(item, dict):
                raise self.build_error("must be an object", place=place)
            yield Row(self, place, item)

    def build_error(self, detail: str, *, place: str = "") -> TaskUnreadable:
        where = f"{self.path.name}, {place}" if place else self.path.name
        return TaskUnreadable(f"{where}: {detail}")

    def add_note(self, detail: str, *, place: str = "") -> None:
        self._notes.append(Note(place, detail))

    def finish(self, tasks: Sequence[T]) -> Loaded[T]:
        """Return the tasks with the notes. Raises `TaskUnreadable` if there are none."""
        if not tasks:
            raise self.build_error("has no tasks")
        return Loaded(tuple(tasks), tuple(self._notes))


@dataclass(frozen=True)
class Row:
    file: BenchmarkFile
    place: str
    fields: Mapping[str, Any]

    def read_text(self, column: str) -> str:
        """Return a text without spaces around it. Raises if it is blank."""
        text = self.read_optional_text(column)
        if not text:
            raise self.build_error(f"{column!r} is blank")
        return text

    def read_optional_text(self, column: str) -> str:
        """Return a text without spaces around it, possibly empty. Raises if the cell is missing."""
        text = self._read_value(column)
        if not isinstance(text, str):
            raise self.build_error(f"{column!r} must be text, not {type(text).__name__}")
        if "\0" in text or has_lone_surrogate(text):
            raise self.build_error(f"{column!r} must be UTF-8 text without NUL characters")
        stripped = text.strip()
        if stripped and stripped != text:
            self.add_note(f"{column!r}: spaces around {stripped!r} removed")
        return stripped

    def read_seed(self, column: str) -> int:
        """Return a seed of 0 or more. It may be written as text."""
        value = self._read_value(column)
        if isinstance(value, str) and value.strip().isdecimal():
            self.add_note(f"{column!r}: the text {value!r} read as a number")
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.build_error(f"{column!r} must be a whole number of 0 or more, not {value!r}")
        return value

    def build_error(self, detail: str) -> TaskUnreadable:
        return self.file.build_error(detail, place=self.place)

    def add_note(self, detail: str) -> None:
        self.file.add_note(detail, place=self.place)

    def _read_value(self, column: str) -> Any:
        value = self.fields.get(column)
        if value is None:
            raise self.build_error(f"there is no {column!r}")
        return value
