"""Who works on what: the one place with SKIP LOCKED, leases and fences.

Leases use the database's clock only. A result is written through `finish`, which checks that the attempt still holds
the job: a worker that was stopped past its lease cannot write over the one that took its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast
from uuid import UUID

from sqlalchemy import CursorResult, Select, func, select, text, tuple_, update
from sqlalchemy.orm import Session

from app.db.models import Job, JsonObject
from emender.schemas.common import Progress


class LeaseLost(Exception):
    """The attempt no longer holds its job: its lease ran out and the job was requeued, or it has ended."""


@dataclass(frozen=True)
class Lease:
    """What a worker holds: the job and the attempt that may write its result."""

    job_id: UUID
    kind: str
    target_id: UUID
    attempt: int
    payload_version: int

    @classmethod
    def of(cls, job: Job) -> "Lease":
        """The lease of the job's latest attempt."""
        return cls(job.id, job.kind, job.target_id, job.attempt, job.payload_version)


def claim(
    session: Session, *, worker: str, lease_seconds: float, candidates: Select[UUID], limit: int = 1
) -> list[Lease]:
    """Take up to `limit` queued jobs among `candidates` (a select of `Job.id`), by turn, skipping locked ones."""
    # The index of the queue has the order. After a large batch, of which its statistics know nothing yet, Postgres
    # would rather sort all that is queued, which it takes to be one row.
    session.execute(text("SET LOCAL enable_sort = off"))
    chosen = (
        candidates.where(Job.state == "queued")
        .order_by(Job.turn, Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=Job)
    )
    ids = session.scalars(chosen).all()
    if not ids:
        return []
    claimed = session.scalars(
        update(Job)
        .where(Job.id.in_(ids))
        .values(
            state="running",
            attempt=Job.attempt + 1,
            worker=worker,
            started_at=func.now(),
            lease_expires_at=func.now() + timedelta(seconds=lease_seconds),
            progress=None,
        )
        .returning(Job),
        execution_options={"populate_existing": True},
    ).all()
    return [Lease.of(job) for job in sorted(claimed, key=lambda job: (job.turn, job.id))]


def renew(session: Session, *, leases: Sequence[Lease], lease_seconds: float) -> dict[UUID, bool]:
    """Extend the leases that are still ours; the result maps their job ids to whether a cancel was asked for."""
    held = tuple_(Job.id, Job.attempt).in_([(lease.job_id, lease.attempt) for lease in leases])
    extended = (
        update(Job)
        .where(held, Job.state == "running")
        .values(lease_expires_at=func.now() + timedelta(seconds=lease_seconds))
        .returning(Job.id, Job.cancel_requested)
    )
    return {row.id: row.cancel_requested for row in session.execute(extended)}


def hold(session: Session, *, lease: Lease) -> bool:
    """Lock the job to the end of the transaction; returns whether a cancel was asked for.

    Raises `LeaseLost` where the attempt no longer holds it. Between this and `finish` no cancel can come in, and the
    job is locked before its domain row, as everyone does who takes both.
    """
    cancel = session.scalar(
        select(Job.cancel_requested)
        .where(Job.id == lease.job_id, Job.attempt == lease.attempt, Job.state == "running")
        .with_for_update()
    )
    if cancel is None:
        raise LeaseLost(f"job {lease.job_id}, attempt {lease.attempt}")
    return cancel


def report(session: Session, *, lease: Lease, progress: Progress) -> None:
    """Write progress; silent where the lease was lost, since the result will be refused anyway."""
    session.execute(_held(lease).values(progress=progress.model_dump(exclude_none=True)))


def finish(session: Session, *, lease: Lease, state: str, problem: JsonObject | None = None) -> None:
    """The fence: end the job as this attempt, in the transaction that writes its result, or raise `LeaseLost`."""
    statement = _held(lease).values(state=state, problem=problem, finished_at=func.now(), lease_expires_at=None)
    result = cast(CursorResult[Any], session.execute(statement))
    if result.rowcount != 1:
        raise LeaseLost(f"job {lease.job_id}, attempt {lease.attempt}")


def release(session: Session, *, lease: Lease) -> None:
    """Give a job back unfinished, as a worker does that is told to stop; it does not count as an attempt."""
    session.execute(_held(lease).values(**_QUEUED, attempt=Job.attempt - 1))


def requeue(session: Session, *, lease: Lease) -> None:
    """Give back a job whose worker is gone; the attempt counts."""
    session.execute(_held(lease).values(**_QUEUED))


def expired(session: Session, *, limit: int = 100) -> list[Job]:
    """Running jobs whose lease ran out, locked for the caller, who requeues or fails them."""
    return list(
        session.scalars(
            select(Job)
            .where(Job.state == "running", Job.lease_expires_at < func.now())
            .order_by(Job.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
    )


_QUEUED: dict[str, Any] = {"state": "queued", "worker": None, "lease_expires_at": None, "progress": None}


def _held(lease: Lease) -> Any:
    return update(Job).where(Job.id == lease.job_id, Job.attempt == lease.attempt, Job.state == "running")
