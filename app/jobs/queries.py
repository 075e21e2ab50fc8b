"""Read and cancel the jobs of resources, and count the queue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.db.models import Checkpoint, Edit, Evaluation, Job, Model, Statistics
from app.jobs.kinds import KINDS
from app.jobs.states import CANCELLED
from emender.schemas.common import Progress, WorkStatus

Work = Model | Statistics | Edit | Checkpoint | Evaluation


def is_in_queue(queue: str) -> ColumnElement[bool]:
    """Whether a job belongs to the queue, by its kind."""
    return Job.kind.in_([kind.name for kind in KINDS.values() if kind.queue == queue])


def latest_job(session: Session, *, target_id: UUID) -> Job:
    """Return the row's latest job, locked. Jobs are locked before the rows they work on."""
    query = select(Job).where(Job.target_id == target_id).order_by(Job.id.desc()).limit(1)
    return session.scalars(query.with_for_update(), execution_options={"populate_existing": True}).one()


def latest_jobs(session: Session, target_ids: Sequence[UUID]) -> Mapping[UUID, Job]:
    """Return the latest job of each row that has one."""
    query = select(Job).where(Job.target_id.in_(target_ids)).order_by(Job.target_id, Job.id.desc())
    jobs = session.scalars(query.ext(distinct_on(Job.target_id)), execution_options={"populate_existing": True})
    return {job.target_id: job for job in jobs}


def running_progress(session: Session, *, target_ids: Sequence[UUID]) -> Mapping[UUID, Progress]:
    """Return the progress of the targets whose job is running and has reported some."""
    query = select(Job.target_id, Job.progress).where(Job.target_id.in_(target_ids), Job.state == "running")
    found = session.execute(query).all()  # a claim writes the JSON null
    return {target_id: Progress.model_validate(progress) for target_id, progress in found if progress is not None}


def work_status(session: Session, row: Work) -> WorkStatus:
    """Return the state of a row and the progress of its job."""
    job = latest_jobs(session, [row.id]).get(row.id)
    return WorkStatus(
        id=row.id,
        state=row.state,
        attempt=job.attempt if job else 0,
        progress=job.progress if job and job.state == "running" else None,
        problem=row.problem,
    )


RECENT = 1_000


@dataclass(frozen=True)
class Worker:
    name: str
    running: int
    seen_at: datetime


@dataclass(frozen=True)
class Queue:
    """The queue, and the workers and failures of the newest `RECENT` jobs."""

    queued: int
    running: int
    oldest_queued_at: datetime | None
    at_work: Sequence[Job]
    workers: Sequence[Worker]
    failed: Sequence[Job]


def queue(session: Session, *, listed: int) -> Queue:
    """Read the queue of work, with the oldest `listed` running jobs and the newest `listed` failed ones."""
    waiting = select(Job.state, func.count(), func.min(Job.created_at))
    waiting = waiting.where(is_in_queue("work"), Job.state.in_(("queued", "running")))
    counts = {state: (count, oldest) for state, count, oldest in session.execute(waiting.group_by(Job.state))}
    newest = select(Job.id).where(is_in_queue("work")).order_by(Job.id.desc()).limit(RECENT)
    seen_at = func.max(func.coalesce(Job.finished_at, func.now()))
    running = func.count().filter(Job.state == "running")
    of_workers = (
        select(Job.worker, running, seen_at)
        .where(Job.id.in_(newest), Job.worker.is_not(None))
        .where(or_(Job.state == "running", Job.finished_at.is_not(None)))
        .group_by(Job.worker)
        .order_by(seen_at.desc(), Job.worker)
    )
    at_work = select(Job).where(is_in_queue("work"), Job.state == "running").order_by(Job.id).limit(listed)
    failed = select(Job).where(Job.id.in_(newest), Job.state == "failed").order_by(Job.id.desc()).limit(listed)
    return Queue(
        queued=counts.get("queued", (0, None))[0],
        running=counts.get("running", (0, None))[0],
        oldest_queued_at=counts.get("queued", (0, None))[1],
        at_work=session.scalars(at_work).all(),
        workers=[Worker(name or "", count, seen) for name, count, seen in session.execute(of_workers)],
        failed=session.scalars(failed).all(),
    )


def cancel(session: Session, job: Job) -> bool:
    """Cancel a locked job that is queued and return True; request the cancel of a running one and return False."""
    if job.state == "queued":
        job.state, job.problem, job.finished_at = "cancelled", CANCELLED, session.scalar(select(func.now()))
        return True
    job.cancel_requested = True
    return False
