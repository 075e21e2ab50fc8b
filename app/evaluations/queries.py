"""Reads of evaluations with what clients want to see beside them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.db.models import Evaluation, Job


def of_checkpoint(checkpoint_id: UUID, *, kind: str | None) -> Select[Evaluation]:
    query = select(Evaluation).where(Evaluation.checkpoint_id == checkpoint_id)
    return query.where(Evaluation.kind == kind) if kind else query


def latest_job(session: Session, *, evaluation_id: UUID) -> Job:
    """The evaluation's job, locked. Jobs are locked before domain rows, here as by the workers."""
    query = select(Job).where(Job.target_id == evaluation_id).order_by(Job.id.desc()).limit(1)
    return session.scalars(query.with_for_update(), execution_options={"populate_existing": True}).one()


def running_progress(session: Session, *, ids: Sequence[UUID]) -> dict[UUID, dict[str, object] | None]:
    """What the running jobs of these evaluations have to tell."""
    query = select(Job).where(Job.target_id.in_(ids)).order_by(Job.target_id, Job.id.desc())
    jobs = session.scalars(query.ext(distinct_on(Job.target_id)), execution_options={"populate_existing": True})
    return {job.target_id: job.progress for job in jobs if job.state == "running"}
