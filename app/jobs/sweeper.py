"""Requeue jobs whose lease expired, and send lost notifications again. Any number of sweepers may run at once."""

from datetime import timedelta

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.models import Job
from app.jobs import leases, states
from app.jobs.leases import Lease
from app.jobs.notifier import JobNotifier
from app.jobs.queries import is_in_queue
from app.observability.metrics import LEASES_EXPIRED

log = structlog.get_logger()

STALE_SECONDS = 5.0
"""A job that is due for longer is notified again."""


def requeue_expired_jobs(session: Session, *, max_attempts: int) -> int:
    """Requeue jobs whose lease expired; returns how many.

    A job ends as cancelled if a cancel was requested, and as failed after its last attempt. The caller commits.
    """
    jobs = leases.find_expired(session)
    for job in jobs:
        lease = Lease.of(job)
        log.warning("lease expired", job=str(job.id), kind=job.kind, attempt=job.attempt, worker=job.worker)
        outcome = "requeued"
        if job.cancel_requested:
            outcome = "cancelled"
            states.cancel(session, lease=lease)
        elif job.attempt >= (lease.kind.max_attempts or max_attempts):
            outcome = "failed"
            states.fail(session, lease=lease, problem=_worker_lost(job.attempt))
        else:
            leases.requeue(session, lease=lease)
            states.set_queued(session, kind=lease.kind, target_ids=[job.target_id])
        LEASES_EXPIRED.labels(job.kind, outcome).inc()
    return len(jobs)


def renotify_stale_jobs(session: Session, *, notifier: JobNotifier, limit: int = 1000) -> int:
    """Notify workers again of jobs that are due and not claimed; returns how many.

    Does nothing while other notifications are queued. Raises `NotifierUnavailable`.
    """
    if not notifier.needs_notification():
        return 0
    stale = (
        select(Job.id)
        .where(Job.state == "queued", is_in_queue("work"))
        .where(Job.due_at < func.now() - timedelta(seconds=STALE_SECONDS))
        .order_by(Job.fair_order, Job.id)
        .limit(limit)
    )
    job_ids = session.scalars(stale).all()
    if job_ids:
        notifier.notify(job_ids)
    return len(job_ids)


def _worker_lost(attempts: int) -> dict[str, object]:
    detail = (
        f"The worker was lost in each of {attempts} attempts. The worker's machine may be short of memory: see the "
        "worker's log and the kernel's. Retry once the cause is fixed."
    )
    return {"title": "Worker lost", "detail": detail, "errors": []}
