"""The states that jobs give to the resources they work on, with an audit event for each end."""

from collections.abc import Collection
from typing import Any
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import Base, Checkpoint, Edit, Evaluation, JsonObject, Model, Statistics
from app.jobs import leases
from app.jobs.kinds import JobKind
from app.jobs.leases import Lease

CANCELLED: JsonObject = {"title": "Cancelled", "detail": "It was cancelled on request.", "errors": []}
"""The problem of a cancelled job and of its resource."""

_TABLES: dict[str, Any] = {mapper.class_.__tablename__: mapper.class_ for mapper in Base.registry.mappers}


def set_running(session: Session, *, kind: JobKind, target_ids: Collection[UUID]) -> None:
    """Set queued resources to their running state. One that is being cancelled keeps its state."""
    _move(session, kind, target_ids, kind.queued, kind.running)


def set_queued(session: Session, *, kind: JobKind, target_ids: Collection[UUID]) -> None:
    """Set running resources back to their queued state. One that is being cancelled keeps its state."""
    _move(session, kind, target_ids, kind.running, kind.queued)


def fail(session: Session, *, lease: Lease, problem: JsonObject) -> None:
    """End a job and its resource as failed. Raises `LeaseLost`."""
    leases.finish(session, lease=lease, state="failed", problem=problem)
    end_resource(session, lease=lease, state="failed", problem=problem)


def cancel(session: Session, *, lease: Lease) -> None:
    """End a job and its resource as cancelled. Raises `LeaseLost`."""
    leases.finish(session, lease=lease, state="cancelled", problem=CANCELLED)
    end_resource(session, lease=lease, state="cancelled", problem=CANCELLED)


def end_resource(
    session: Session, *, lease: Lease, state: str, problem: JsonObject | None = None, details: JsonObject | None = None
) -> None:
    """Set the last state of a job's resource; the audit event has the `details`."""
    row = session.get_one(_TABLES[lease.kind.table], lease.target_id)
    before, row.state = row.state, state
    if not lease.kind.audited:
        return
    row.problem = problem
    attempt: JsonObject = {lease.kind.resource: str(row.id), "job": str(lease.job_id), "attempt": lease.attempt}
    record(
        session,
        actor="worker",
        action=f"{lease.kind.resource}.{state}",
        target=_audit_target(row),
        details=attempt | (details or {}) | ({"problem": problem["title"]} if problem else {}),
        before={"state": before},
        after={"state": state},
    )


def _audit_target(row: object) -> str:
    match row:
        case Edit():
            return f"edit:{row.id}"
        case Model():
            return f"model:{row.name}"
        case Statistics():
            return f"model:{row.model.name}"
        case Checkpoint():
            return row.audit_target
        case Evaluation():
            return _audit_target(row.checkpoint)
    raise TypeError(f"no audit target is known for {row!r}")


def _move(session: Session, kind: JobKind, target_ids: Collection[UUID], before: str, after: str) -> None:
    if before != after:
        table = _TABLES[kind.table]
        session.execute(update(table).where(table.id.in_(target_ids), table.state == before).values(state=after))
