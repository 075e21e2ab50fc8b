"""Enqueue in the caller's transaction. `app.queueing.dispatcher` rings the bell after the commit."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job, Outbox


def enqueue(session: Session, *, kind: str, target_id: UUID, actor: str) -> UUID:
    """Add a job and its outbox row to the transaction; returns the job's id."""
    return enqueue_many(session, kind=kind, target_ids=[target_id], actor=actor)[0]


def enqueue_many(session: Session, *, kind: str, target_ids: Sequence[UUID], actor: str) -> list[UUID]:
    """The same for many targets, in three statements."""
    job_ids = [uuid7() for _ in target_ids]
    first = _next_turn(session, actor=actor)
    jobs = [
        {"id": job_id, "kind": kind, "target_id": target_id, "created_by": actor, "turn": turn}
        for turn, (job_id, target_id) in enumerate(zip(job_ids, target_ids, strict=True), start=first)
    ]
    session.execute(insert(Job), jobs)
    session.execute(insert(Outbox), [{"job_id": job_id} for job_id in job_ids])
    return job_ids


def _next_turn(session: Session, *, actor: str) -> int:
    """The turn of the actor's next job: after the last that it has in the queue, and not before the turn it is now.

    Jobs are claimed by turn, so that whoever has many in the queue and whoever has one are served alternately:
    start-time fair queueing. Two jobs of one actor may get the same turn at once, which harms nobody.
    """
    now = select(func.min(Job.turn)).where(Job.state == "queued").scalar_subquery()
    last = select(func.max(Job.turn)).where(Job.state == "queued", Job.created_by == actor).scalar_subquery()
    return session.scalars(select(func.greatest(now, last + 1, 0))).one()
