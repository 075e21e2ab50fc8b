"""Enqueue in the caller's transaction. `app.jobs.dispatcher` rings the bell after the commit."""

import itertools
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job, Outbox
from app.db.rows import insert_rows


def enqueue(session: Session, *, kind: str, target_id: UUID, actor: str) -> UUID:
    """Add a job and its outbox row to the transaction; returns the job's id."""
    return enqueue_each(session, kind=kind, targets=[(target_id, actor)])[0]


def enqueue_many(session: Session, *, kind: str, target_ids: Sequence[UUID], actor: str) -> list[UUID]:
    """The same for many targets, in three statements."""
    return enqueue_each(session, kind=kind, targets=[(target_id, actor) for target_id in target_ids])


def enqueue_each(session: Session, *, kind: str, targets: Sequence[tuple[UUID, str]]) -> list[UUID]:
    """The same for targets of different actors, in two statements and one for each actor."""
    actors = {actor for _, actor in targets}
    turns = {actor: itertools.count(_next_turn(session, actor=actor)) for actor in actors}
    job_ids = [uuid7() for _ in targets]
    new = {"kind": kind, "state": "queued", "attempt": 0, "payload_version": 1, "cancel_requested": False}
    jobs = [
        {"id": job_id, "target_id": target_id, "created_by": actor, "turn": next(turns[actor]), **new}
        for job_id, (target_id, actor) in zip(job_ids, targets, strict=True)
    ]
    insert_rows(session, Job, jobs)
    insert_rows(session, Outbox, [{"job_id": job_id} for job_id in job_ids])
    return job_ids


def _next_turn(session: Session, *, actor: str) -> int:
    """The turn of the actor's next job: after the last that it has in the queue, and not before the turn it is now.

    Jobs are claimed by turn, so that whoever has many in the queue and whoever has one are served alternately:
    start-time fair queueing. Two jobs of one actor may get the same turn at once, which harms nobody.
    """
    now = select(func.min(Job.turn)).where(Job.state == "queued").scalar_subquery()
    last = select(func.max(Job.turn)).where(Job.state == "queued", Job.created_by == actor).scalar_subquery()
    return session.scalars(select(func.greatest(now, last + 1, 0))).one()
