"""Finds what fell by the wayside: jobs whose worker died, and rings that nobody heard. Any number may run at once."""

from datetime import timedelta
from typing import Protocol

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.models import Job, JsonObject, Outbox
from app.jobs import leases, states
from app.jobs.kinds import KINDS
from app.jobs.leases import Lease
from app.jobs.notifier import Bell
from app.jobs.states import CANCELLED
from app.observability.metrics import LEASES_EXPIRED

log = structlog.get_logger()

UNHEARD_SECONDS = 5.0
"""A job queued for longer is announced again."""


class Fail(Protocol):
    """Ends a job and its domain row as failed, or as cancelled where the problem is `CANCELLED`."""

    def __call__(self, session: Session, *, lease: Lease, problem: JsonObject) -> None: ...


def requeue_expired(session: Session, *, max_attempts: int, fail: Fail) -> int:
    """Requeue the jobs whose lease ran out; returns how many.

    One whose cancel was asked for ends as cancelled, one that had all its attempts as failed. The caller commits.
    """
    jobs = leases.expired(session)
    for job in jobs:
        lease = Lease.of(job)
        log.warning("lease ran out", job=str(job.id), kind=job.kind, attempt=job.attempt, worker=job.worker)
        outcome = "requeued"
        if job.cancel_requested:
            outcome = "cancelled"
            fail(session, lease=lease, problem=CANCELLED)
        elif job.attempt >= max_attempts:
            outcome = "failed"
            fail(session, lease=lease, problem=lost(job.attempt))
        else:
            leases.requeue(session, lease=lease)
            states.set_queued(session, kind=KINDS[job.kind], target_ids=[job.target_id])
        LEASES_EXPIRED.labels(job.kind, outcome).inc()
    return len(jobs)


def ring_again(session: Session, *, bell: Bell, limit: int = 1000) -> int:
    """Announce what is queued though its bell was rung a while ago: Redis may have lost it. Returns how many."""
    unheard = (
        select(Job.id)
        .where(Job.state == "queued", Job.created_at < func.now() - timedelta(seconds=UNHEARD_SECONDS))
        .where(~select(Outbox.id).where(Outbox.job_id == Job.id).exists())
        .order_by(Job.id)
        .limit(limit)
    )
    job_ids = session.scalars(unheard).all()
    if job_ids:
        bell.ring(job_ids)
    return len(job_ids)


def lost(attempts: int) -> JsonObject:
    """The problem of a job whose workers died each time."""
    detail = (
        f"The worker was lost in each of {attempts} attempts, so this is not tried again by itself. The worker's "
        "machine may be short of memory; its log and the kernel's say more. Retry once that is mended."
    )
    return {"title": "Worker lost", "detail": detail, "errors": []}
