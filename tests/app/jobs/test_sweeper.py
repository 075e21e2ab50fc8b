from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Edit, Job, Model
from app.jobs import leases
from app.jobs.enqueue import enqueue
from app.jobs.kinds import KINDS, OPTIMIZE_EDIT
from app.jobs.states import CANCELLED, set_running
from app.jobs.sweeper import STALE_SECONDS, renotify_stale_jobs, requeue_expired_jobs
from tests.app.jobs.conftest import RecordingNotifier


@pytest.fixture
def edit(session: Session, add_model: Callable[..., Model]) -> Edit:
    model = add_model()
    edit = Edit(model_id=model.id, source="a", destination={"prompt": "b"}, templates=["{}"], settings={})
    edit.created_by = "test"
    session.add(edit)
    session.flush()
    return edit


def expire(session: Session, edit: Edit, **columns: Any) -> UUID:
    """A job for the edit whose worker died; returns its id."""
    job_id = enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit.id, actor="test")
    leases.claim(session, worker="dead", lease_seconds=30, candidates=select(Job.id))
    set_running(session, kind=OPTIMIZE_EDIT, target_ids=[edit.id])
    past = func.now() - timedelta(seconds=1)
    session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=past, **columns))
    return job_id


def read(session: Session, job_id: UUID) -> Job:
    return session.get_one(Job, job_id, populate_existing=True)


class TestRequeueExpiredJobs:
    def test_requeues_the_job_and_its_edit(self, session: Session, edit: Edit) -> None:
        job_id = expire(session, edit)
        session.refresh(edit)
        assert edit.state == "optimizing"
        assert requeue_expired_jobs(session, max_attempts=5) == 1
        session.refresh(edit)
        job = read(session, job_id)
        assert (job.state, job.attempt, job.worker, job.lease_expires_at) == ("queued", 1, None, None)
        assert (edit.state, edit.problem) == ("queued", None)

    def test_leaves_a_lease_that_is_held(self, session: Session, edit: Edit) -> None:
        enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit.id, actor="test")
        leases.claim(session, worker="alive", lease_seconds=30, candidates=select(Job.id))
        assert requeue_expired_jobs(session, max_attempts=5) == 0

    def test_fails_a_job_after_its_last_attempt(self, session: Session, edit: Edit) -> None:
        job_id = expire(session, edit, attempt=5)
        requeue_expired_jobs(session, max_attempts=5)
        job = read(session, job_id)
        assert job.state == edit.state == "failed" and job.problem == edit.problem is not None
        assert (
            job.problem is not None and job.problem["title"] == "Worker lost" and "5 attempts" in job.problem["detail"]
        )
        event = session.scalars(select(AuditEvent)).one()
        assert (event.action, event.target, event.before) == ("edit.failed", f"edit:{edit.id}", {"state": "optimizing"})

    def test_cancels_a_job_whose_cancel_was_requested(self, session: Session, edit: Edit) -> None:
        job_id = expire(session, edit, cancel_requested=True)
        requeue_expired_jobs(session, max_attempts=5)
        assert (read(session, job_id).state, edit.state, edit.problem) == ("cancelled", "cancelled", CANCELLED)

    def test_leaves_jobs_of_a_kind_that_only_newer_workers_know(self, session: Session, edit: Edit) -> None:
        job_id = expire(session, edit)
        with patch.dict("app.jobs.kinds.KINDS"):
            del KINDS["optimize_edit"]
            assert requeue_expired_jobs(session, max_attempts=5) == 0
        assert read(session, job_id).state == "running"


class TestRenotifyStaleJobs:
    def test_notifies_of_jobs_that_are_due_for_seconds(
        self, session: Session, edit: Edit, notifier: RecordingNotifier
    ) -> None:
        job_id = enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit.id, actor="test")
        assert renotify_stale_jobs(session, notifier=notifier) == 0
        session.execute(update(Job).values(due_at=func.now() - timedelta(seconds=STALE_SECONDS + 1)))
        assert renotify_stale_jobs(session, notifier=notifier) == 1
        assert notifier.notified == [job_id]

    def test_waits_while_notifications_are_under_way(
        self, session: Session, edit: Edit, notifier: RecordingNotifier
    ) -> None:
        enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit.id, actor="test")
        session.execute(update(Job).values(due_at=func.now() - timedelta(seconds=STALE_SECONDS + 1)))
        notifier.pending = True
        assert renotify_stale_jobs(session, notifier=notifier) == 0
