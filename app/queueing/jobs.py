"""The jobs of domain rows: the latest of each, and how one is cancelled."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.db.models import Job, JsonObject
from app.queueing.states import CANCELLED


def latest_job(session: Session, *, target_id: UUID) -> Job:
    """The row's latest job, locked. Jobs are locked before domain rows, here as by the workers."""
    query = select(Job).where(Job.target_id == target_id).order_by(Job.id.desc()).limit(1)
    return session.scalars(query.with_for_update(), execution_options={"populate_existing": True}).one()


def latest_jobs(session: Session, target_ids: Sequence[UUID]) -> Mapping[UUID, Job]:
    """The latest job of each row that has one, unlocked."""
    query = select(Job).where(Job.target_id.in_(target_ids)).order_by(Job.target_id, Job.id.desc())
    jobs = session.scalars(query.ext(distinct_on(Job.target_id)), execution_options={"populate_existing": True})
    return {job.target_id: job for job in jobs}


def running_progress(session: Session, *, target_ids: Sequence[UUID]) -> Mapping[UUID, JsonObject | None]:
    """How far the job of each target is, for those at work."""
    query = select(Job.target_id, Job.progress).where(Job.target_id.in_(target_ids), Job.state == "running")
    return dict(session.execute(query).all())


def cancel(session: Session, job: Job) -> bool:
    """End a locked job that is queued, and return True; ask one at work to stop, and return False."""
    if job.state == "queued":
        job.state, job.problem, job.finished_at = "cancelled", CANCELLED, session.scalar(select(func.now()))
        return True
    job.cancel_requested = True
    return False
