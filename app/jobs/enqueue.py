"""Enqueue jobs in the caller's transaction."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job
from app.jobs.kinds import KINDS, JobKind
from app.jobs.notifier import ENQUEUED


def enqueue(session: Session, *, kind: JobKind, target_id: UUID, actor: str) -> UUID:
    """Add a job to the transaction and return its id.

    Its place in the fair order (start-time fair queueing) follows the actor's last queued job, but never precedes the
    first job of the queue. So actors are served alternately, however many jobs each has. Two requests of one actor at
    the same moment may get the same place.
    """
    kinds = [other.name for other in KINDS.values() if other.queue == kind.queue]
    due = Job.state == "queued", Job.kind.in_(kinds), Job.due_at <= func.now()
    first = select(func.min(Job.fair_order)).where(*due).scalar_subquery()
    last = select(func.max(Job.fair_order)).where(Job.state == "queued", Job.created_by == actor).scalar_subquery()
    job = Job(id=uuid7(), kind=kind.name, target_id=target_id, created_by=actor)
    job.fair_order = func.greatest(first, last + 1, 0)
    session.add(job)
    if kind.queue == "work":
        session.info.setdefault(ENQUEUED, []).append(job.id)
    return job.id


def enqueue_many(session: Session, *, kind: JobKind, target_ids: Sequence[UUID], actor: str) -> list[UUID]:
    """Add a job for each target, one after the other in the fair order, and return their ids."""
    job_ids = [enqueue(session, kind=kind, target_id=target_ids[0], actor=actor)]
    order = session.get_one(Job, job_ids[0]).fair_order
    jobs = [
        {"id": uuid7(), "kind": kind.name, "target_id": target_id, "created_by": actor, "fair_order": order + place}
        for place, target_id in enumerate(target_ids[1:], start=1)
    ]
    if jobs:
        job_ids += session.scalars(insert(Job).returning(Job.id, sort_by_parameter_order=True), jobs)
        if kind.queue == "work":
            session.info[ENQUEUED] += job_ids[1:]
    return job_ids
