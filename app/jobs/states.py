"""The states that a job gives to its resource."""

from collections.abc import Collection
from typing import Any
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.orm import Session

from app.db.models import Base, JsonObject
from app.jobs.kinds import JobKind

CANCELLED: JsonObject = {"title": "Cancelled", "detail": "It was cancelled on request.", "errors": []}
"""The problem of a cancelled job and of its resource."""

_TABLES: dict[str, Any] = {mapper.class_.__tablename__: mapper.class_ for mapper in Base.registry.mappers}


def table_of(kind: JobKind) -> Any:
    """The mapped class of the rows that jobs of this kind work on."""
    return _TABLES[kind.table]


def set_running(session: Session, *, kind: JobKind, target_ids: Collection[UUID]) -> None:
    """Set queued resources to their running state. One that is being cancelled keeps its state."""
    _move(session, kind, target_ids, kind.queued, kind.running)


def set_queued(session: Session, *, kind: JobKind, target_ids: Collection[UUID]) -> None:
    """Set running resources back to their queued state. One that is being cancelled keeps its state."""
    _move(session, kind, target_ids, kind.running, kind.queued)


def _move(session: Session, kind: JobKind, target_ids: Collection[UUID], before: str, after: str) -> None:
    if before != after:
        table = table_of(kind)
        session.execute(update(table).where(table.id.in_(target_ids), table.state == before).values(state=after))
