"""Keyset pagination: pages of rows by a key that grows, newest first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, TypeVarTuple
from uuid import UUID

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

Row = TypeVar("Row")
Key = TypeVar("Key", UUID, int)
Columns = TypeVarTuple("Columns")


@dataclass(frozen=True)
class PageCursor(Generic[Key]):
    """Select at most `limit` rows whose key is lower than `after`, the last key of the previous page."""

    limit: int
    after: Key | None = None

    def fetch(
        self, session: Session, query: Select[Row], key: InstrumentedAttribute[Key]
    ) -> tuple[Sequence[Row], str | None]:
        """Return the page's rows and the cursor of the next page, or None on the last page."""
        rows = session.scalars(self.select(query, key)).all()
        return self.split(rows, keys=[getattr(row, key.key) for row in rows])

    def select(self, query: Select[*Columns], key: InstrumentedAttribute[Key]) -> Select[*Columns]:
        """Order `query` by descending `key` and limit it to the page and one more row."""
        if self.after is not None:
            query = query.where(key < self.after)
        return query.order_by(key.desc()).limit(self.limit + 1)

    def split(self, rows: Sequence[Row], *, keys: Sequence[Key]) -> tuple[Sequence[Row], str | None]:
        """Return the page's rows of those that `select` found, and the cursor of the next page."""
        if len(rows) <= self.limit:
            return rows, None
        return rows[: self.limit], str(keys[self.limit - 1])
