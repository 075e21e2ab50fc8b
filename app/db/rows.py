"""Insert many rows with one parameter. With one parameter per value the driver needs several times the CPU time."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Result, TextClause, text
from sqlalchemy.orm import Session

from app.db.models import Base


def insert_rows(
    session: Session, model: type[Base], rows: Sequence[Mapping[str, Any]], *, returning: str | None = None
) -> Result[Any]:
    """Insert rows that all have the same columns, by column name. Other columns get the database's default."""
    statement = _statement(model.__tablename__, tuple(rows[0]), returning)
    return session.execute(statement, {"rows": json.dumps(rows, default=_to_postgres)})


@cache
def _statement(table: str, columns: tuple[str, ...], returning: str | None) -> TextClause:
    names = ", ".join(columns)
    rows = f"SELECT {names} FROM jsonb_populate_recordset(NULL::{table}, CAST(:rows AS jsonb))"
    return text(f"INSERT INTO {table} ({names}) {rows}" + (f" RETURNING {returning}" if returning else ""))


def _to_postgres(value: object) -> str:
    """Write what JSON has no form for as Postgres reads it: bytes, UUIDs, times."""
    return "\\x" + value.hex() if isinstance(value, bytes) else str(value)


def column_values(row: Base) -> dict[str, Any]:
    """Return the values of a row by column name, as input for a schema that has some of them."""
    return {column.key: getattr(row, column.key) for column in row.__table__.columns}
