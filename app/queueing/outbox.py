"""Enqueue in the caller's transaction. `app.queueing.dispatcher` rings the bell after the commit."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import insert
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job, Outbox


def enqueue(session: Session, *, kind: str, target_id: UUID) -> UUID:
    """Add a job and its outbox row to the transaction; returns the job's id."""
    return enqueue_many(session, kind=kind, target_ids=[target_id])[0]


def enqueue_many(session: Session, *, kind: str, target_ids: Sequence[UUID]) -> list[UUID]:
    """The same for many targets, in two statements."""
    job_ids = [uuid7() for _ in target_ids]
    jobs = [
        {"id": job_id, "kind": kind, "target_id": target_id}
        for job_id, target_id in zip(job_ids, target_ids, strict=True)
    ]
    session.execute(insert(Job), jobs)
    session.execute(insert(Outbox), [{"job_id": job_id} for job_id in job_ids])
    return job_ids
