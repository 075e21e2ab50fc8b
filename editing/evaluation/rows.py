"""Benchmarks' files as their authors ship them, row by row: what is wrong is named, what is odd is mended and noted.

Free of torch. Rows are counted as a text editor and as `editing.captions` count them: by the line of a CSV file, its
column names on line 1, and by the item of a JSON list, the first of them 1.
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
class Oddity:
    """What was odd in a row, and what was done about it."""

    place: str
    """"line 3" or "item 3"; empty where it is the whole file."""
    detail: str


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The tasks of a file in its order, and whatever was odd in it."""

    tasks: tuple[T, ...]
    oddities: tuple[Oddity, ...]


class BenchmarkFile:
    """One file of a benchmark. Every method raises `TaskUnreadable` with the file's name and the row."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._oddities: list[Oddity] = []

    def table(self, columns: Sequence[str]) -> Iterator["Row"]:
        """The rows of a CSV file that has at least these columns; more are allowed."""
        try:
            # Bytes that are no UTF-8 come as halves of surrogate pairs, so that their row is found and named.
            with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                rows = csv.DictReader(file, strict=True)
                try:
                    if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
                        raise self.error(f"there is no column {', '.join(map(repr, missing))}", place="line 1")
                    for fields in rows:
                        place = f"line {rows.line_num}"
                        if None in fields:
                            raise self.error("the row has more fields than there are columns", place=place)
                        yield Row(self, place, fields)
                except csv.Error as error:
                    raise self.error(f"is no CSV: {error}", place=f"line {rows.reader.line_num}") from error
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror or error}") from error

    def items(self) -> Iterator["Row"]:
        """The objects of a JSON file that holds a list of them."""
        try:
            items = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise self.error(f"is no JSON: {error}") from error
        if not isinstance(items, list):
            raise self.error("must hold a list of objects")
        for number, item in enumerate(items, start=1):
            place = f"item {number}"
            if not isinstance(item, dict):
                raise self.error("must be an object", place=place)
            yield Row(self, place, item)

    def error(self, detail: str, *, place: str = "") -> TaskUnreadable:
        where = f"{self.path.name}, {place}" if place else self.path.name
        return TaskUnreadable(f"{where}: {detail}")

    def note(self, detail: str, *, place: str = "") -> None:
        self._oddities.append(Oddity(place, detail))

    def loaded(self, tasks: Sequence[T]) -> Loaded[T]:
        if not tasks:
            raise self.error("holds no tasks")
        return Loaded(tuple(tasks), tuple(self._oddities))


@dataclass(frozen=True)
class Row:
    file: BenchmarkFile
    place: str
    fields: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A text that must be there, without spaces around it."""
        text = self.text_or_blank(column)
        if not text:
            raise self.error(f"{column!r} is blank")
        return text

    def text_or_blank(self, column: str) -> str:
        """A text without spaces around it; empty where the cell is blank, an error where there is no cell."""
        text = self._value(column)
        if not isinstance(text, str):
            raise self.error(f"{column!r} must be text, not {type(text).__name__}")
        if "\0" in text or has_lone_surrogate(text):
            raise self.error(f"{column!r} must be UTF-8 text without NUL characters")
        stripped = text.strip()
        if stripped and stripped != text:
            self.note(f"{column!r}: spaces around {stripped!r} taken off")
        return stripped

    def seed(self, column: str) -> int:
        """A seed of 0 or more, also where it is written as text."""
        value = self._value(column)
        if isinstance(value, str) and value.strip().isdecimal():
            self.note(f"{column!r}: the text {value!r} read as a number")
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"{column!r} must be a whole number of 0 or more, not {value!r}")
        return value

    def error(self, detail: str) -> TaskUnreadable:
        return self.file.error(detail, place=self.place)

    def note(self, detail: str) -> None:
        self.file.note(detail, place=self.place)

    def _value(self, column: str) -> Any:
        value = self.fields.get(column)
        if value is None:
            raise self.error(f"there is no {column!r}")
        return value
