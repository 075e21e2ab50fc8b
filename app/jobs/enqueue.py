"""Enqueue jobs in the caller's transaction."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

from sqlalchemy import String, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job
from app.db.rows import insert_rows
from app.jobs.kinds import JobKind
from app.jobs.notifier import ENQUEUED
from app.jobs.queries import is_in_queue


def enqueue(session: Session, *, kind: JobKind, target_id: UUID, actor: str) -> UUID:
    """Add a job to the transaction and return its id."""
    return enqueue_many(session, kind=kind, targets=[(target_id, actor)])[0]


def enqueue_many(session: Session, *, kind: JobKind, targets: Sequence[tuple[UUID, str]]) -> list[UUID]:
    """Add a job for each (target id, actor) and return their ids, in two statements."""
    orders = _next_orders(session, kind.queue, {actor for _, actor in targets})
    counters = {actor: itertools.count(order) for actor, order in orders.items()}
    job_ids = [uuid7() for _ in targets]
    new = {"kind": kind.name, "state": "queued", "attempt": 0, "payload_version": 1, "cancel_requested": False}
    jobs = [
        {"id": job_id, "target_id": target_id, "created_by": actor, "fair_order": next(counters[actor]), **new}
        for job_id, (target_id, actor) in zip(job_ids, targets, strict=True)
    ]
    insert_rows(session, Job, jobs)
    if kind.queue == "work":
        session.info.setdefault(ENQUEUED, []).extend(job_ids)
    return job_ids


def _next_orders(session: Session, queue: str, actors: Collection[str]) -> Mapping[str, int]:
    """Return each actor's next place in the fair order (start-time fair queueing).

    It follows the actor's last queued job, but never precedes the first job of the queue. So actors are served
    alternately, however many jobs each has. Two requests of one actor at the same moment may get the same place.
    """
    due = Job.state == "queued", is_in_queue(queue), Job.due_at <= func.now()
    first = select(func.min(Job.fair_order)).where(*due).scalar_subquery()
    actor = func.unnest(bindparam("actors", list(actors), ARRAY(String))).column_valued("actor")
    last = select(func.max(Job.fair_order)).where(Job.state == "queued", Job.created_by == actor).scalar_subquery()
    return dict(session.execute(select(actor, func.greatest(first, last + 1, 0))).all())
