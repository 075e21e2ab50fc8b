"""Tables as spreadsheets save them: any usual delimiter, a byte-order mark, blank rows, names in any case.

Uses nothing of its package: `editing.tables` is a link to it.
"""

import csv
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO

DELIMITERS = (",", ";", "\t", "|")


class TableError(ValueError):
    """A table that cannot be read. `line` is where, counted as in a text editor."""

    def __init__(self, detail: str, *, line: int) -> None:
        super().__init__(f"line {line}: {detail}")
        self.detail = detail
        self.line = line


def open_text(path: Path) -> IO[str]:
    """Open a text file in UTF-8, or in UTF-16 if it begins with that byte-order mark.

    Invalid bytes become lone surrogates, so that the line with them is found and named.
    """
    with path.open("rb") as file:
        wide = file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE)
    return path.open(encoding="utf-16" if wide else "utf-8-sig", errors="surrogateescape", newline="")


def read_table(
    lines: Iterable[str], *, columns: Sequence[str], default: str = ","
) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield the rows that are not blank: their line, and their cells by column name in lower case.

    The first row has the names. The delimiter is the one that finds most of `columns` there, else `default`. Raises
    `TableError` if none of `columns` is there, and for a row with more cells than names. Cells that
    a row lacks are None.
    """
    lines, number = iter(lines), 0
    for number, line in enumerate(lines, start=1):  # noqa: B007
        header = line.removeprefix("\ufeff")
        if header.strip(" \t\r\n,;|") and not header.startswith("sep="):  # which Excel writes above the names
            break
    else:
        raise TableError(f"the table is empty: its first line must name {_list(columns)}", line=1)
    wanted = {column.casefold() for column in columns}
    by_delimiter = {delimiter: split_names(header, delimiter) for delimiter in (default, *DELIMITERS)}
    delimiter = max(by_delimiter, key=lambda delimiter: len(wanted & {*by_delimiter[delimiter]}))
    names = by_delimiter[delimiter]
    if not wanted & {*names}:
        widest = max(by_delimiter.values(), key=len)
        raise TableError(f"there is no column {_list(columns)}: there is {', '.join(widest)}", line=number)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = number + rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise TableError(f"is not valid CSV: {error}", line=number + rows.line_num) from None
        while len(row) > len(names) and not row[-1].strip():
            row.pop()
        if len(row) > len(names):
            detail = f"has {len(row)} cells, not {len(names)}: a cell with {delimiter!r} needs quotes around it"
            raise TableError(detail, line=start)
        if any(cell.strip() for cell in row):
            yield start, dict(zip_longest(names, row))


def split_names(header: str, delimiter: str) -> list[str]:
    """Return the names of a table's columns in lower case, without spaces around them."""
    return [name.strip().casefold() for name in next(csv.reader([header], delimiter=delimiter), [])]


def _list(columns: Sequence[str]) -> str:
    return " or ".join(map(repr, columns))
