"""Claims, leases and fences: which worker runs which job. The only file with SKIP LOCKED.

Leases use the database's clock only. An attempt ends its job through `finish` or `requeue`, which check that it still
holds the lease: a worker that was stopped past its lease cannot overwrite the result of its successor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast
from uuid import UUID

from sqlalchemy import CursorResult, Select, func, select, text, tuple_, update
from sqlalchemy.orm import Session

from app.db.models import Job, JsonObject
from app.jobs.kinds import KINDS, JobKind
from emender.schemas.common import Progress


class LeaseLost(Exception):
    """The attempt no longer holds its job: its lease expired and the job was requeued, or the job has ended."""


@dataclass(frozen=True)
class Lease:
    """The right of one attempt to write the result of a job."""

    job_id: UUID
    kind: JobKind
    target_id: UUID
    attempt: int

    @classmethod
    def of(cls, job: Job) -> "Lease":
        """Return the lease of the job's latest attempt."""
        return cls(job.id, KINDS[job.kind], job.target_id, job.attempt)


def claim(
    session: Session, *, worker: str, lease_seconds: float, candidates: Select[UUID], limit: int = 1
) -> list[Lease]:
    """Claim up to `limit` queued jobs that are due among `candidates` (a select of `Job.id`), in fair order."""
    # The index of the queue has this order. Postgres's statistics know nothing of a batch that was just inserted,
    # so it would take the queue for one row and sort it.
    session.execute(text("SET LOCAL enable_sort = off"))
    chosen = (
        candidates.where(Job.state == "queued", Job.due_at <= func.now())
        .order_by(Job.fair_order, Job.id)
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
    return [Lease.of(job) for job in sorted(claimed, key=lambda job: (job.fair_order, job.id))]


def renew(session: Session, *, leases: Sequence[Lease], lease_seconds: float) -> dict[UUID, bool]:
    """Extend the leases that are still held. Maps their job ids to whether a cancel was requested."""
    held = tuple_(Job.id, Job.attempt).in_([(lease.job_id, lease.attempt) for lease in leases])
    extended = (
        update(Job)
        .where(held, Job.state == "running")
        .values(lease_expires_at=func.now() + timedelta(seconds=lease_seconds))
        .returning(Job.id, Job.cancel_requested)
    )
    return {row.id: row.cancel_requested for row in session.execute(extended)}


def lock(session: Session, *, lease: Lease) -> bool:
    """Lock the job until the transaction ends. Returns whether a cancel was requested; none can come in afterwards.

    Raises `LeaseLost` if the attempt no longer holds the job. Jobs are locked before the rows that they work on.
    """
    cancel = session.scalar(
        select(Job.cancel_requested)
        .where(Job.id == lease.job_id, Job.attempt == lease.attempt, Job.state == "running")
        .with_for_update()
    )
    if cancel is None:
        raise LeaseLost(f"job {lease.job_id}, attempt {lease.attempt}")
    return cancel


def write_progress(session: Session, *, lease: Lease, progress: Progress) -> None:
    """Write the progress of the attempt, if it still holds the job."""
    session.execute(_update(lease).values(progress=progress.model_dump(exclude_none=True)))


def finish(session: Session, *, lease: Lease, state: str, problem: JsonObject | None = None) -> None:
    """End the job in the transaction that writes its result. Raises `LeaseLost`."""
    _fenced(session, lease, state=state, problem=problem, finished_at=func.now(), lease_expires_at=None)


def requeue(session: Session, *, lease: Lease, delay: float = 0.0, counted: bool = True) -> None:
    """Put the job back into the queue, due after `delay` seconds. Raises `LeaseLost`.

    `counted`: whether the attempt counts. It does not if the worker was stopped.
    """
    _fenced(
        session,
        lease,
        state="queued",
        attempt=Job.attempt if counted else Job.attempt - 1,
        due_at=func.now() + timedelta(seconds=delay),
        worker=None,
        lease_expires_at=None,
        progress=None,
    )


def find_expired(session: Session, *, limit: int = 100) -> list[Job]:
    """Return running jobs whose lease expired, locked until the transaction ends."""
    expired = select(Job).where(Job.state == "running", Job.lease_expires_at < func.now(), Job.kind.in_(KINDS))
    return list(session.scalars(expired.order_by(Job.id).limit(limit).with_for_update(skip_locked=True)))


def _update(lease: Lease) -> Any:
    return update(Job).where(Job.id == lease.job_id, Job.attempt == lease.attempt, Job.state == "running")


def _fenced(session: Session, lease: Lease, **values: object) -> None:
    result = cast(CursorResult[Any], session.execute(_update(lease).values(**values)))
    if result.rowcount != 1:
        raise LeaseLost(f"job {lease.job_id}, attempt {lease.attempt}")
