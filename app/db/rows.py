"""Many rows by one statement with one value: a value for each column of each costs the driver several times as much."""

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
    """Add rows of the same columns, named as the table names them; what is not named has the database's default."""
    return session.execute(
        _statement(model.__tablename__, tuple(rows[0]), returning), {"rows": json.dumps(rows, default=_written)}
    )


@cache
def _statement(table: str, columns: tuple[str, ...], returning: str | None) -> TextClause:
    named = ", ".join(columns)
    given = f"SELECT {named} FROM jsonb_populate_recordset(NULL::{table}, CAST(:rows AS jsonb))"
    return text(f"INSERT INTO {table} ({named}) {given}" + (f" RETURNING {returning}" if returning else ""))


def _written(value: object) -> str:
    """What JSON has no form for, as Postgres reads it: bytes, UUIDs, moments."""
    return "\\x" + value.hex() if isinstance(value, bytes) else str(value)
