from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.db.models import Edit, Job, JsonObject, Model
from app.jobs import leases
from app.jobs.dispatcher import dispatch
from app.jobs.enqueue import enqueue
from app.jobs.kinds import OPTIMIZE_EDIT
from app.jobs.leases import Lease
from app.jobs.states import CANCELLED, set_running
from app.jobs.sweeper import UNHEARD_SECONDS, requeue_expired, ring_again
from tests.app.jobs.conftest import RecordingBell


class Failures:
    """Ends jobs as `app.worker.runner.fail` does, and writes down which, and why."""

    def __init__(self) -> None:
        self.problems: dict[UUID, JsonObject] = {}

    def __call__(self, session: Session, *, lease: Lease, problem: JsonObject) -> None:
        leases.finish(session, lease=lease, state="failed", problem=problem)
        self.problems[lease.job_id] = problem


@pytest.fixture
def failures() -> Failures:
    return Failures()


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


class TestRequeueExpired:
    def test_puts_job_and_edit_back(self, session: Session, edit: Edit, failures: Failures) -> None:
        job_id = expire(session, edit)
        session.refresh(edit)
        assert edit.state == "optimizing"
        assert requeue_expired(session, max_attempts=5, fail=failures) == 1
        session.refresh(edit)
        job = read(session, job_id)
        assert (job.state, job.attempt, job.worker, job.lease_expires_at) == ("queued", 1, None, None)
        assert edit.state == "queued" and failures.problems == {}

    def test_leaves_a_lease_that_holds(self, session: Session, edit: Edit, failures: Failures) -> None:
        enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit.id, actor="test")
        leases.claim(session, worker="alive", lease_seconds=30, candidates=select(Job.id))
        assert requeue_expired(session, max_attempts=5, fail=failures) == 0

    def test_fails_what_had_all_its_attempts(self, session: Session, edit: Edit, failures: Failures) -> None:
        job_id = expire(session, edit, attempt=5)
        requeue_expired(session, max_attempts=5, fail=failures)
        assert failures.problems[job_id]["title"] == "Worker lost"
        assert "5 attempts" in failures.problems[job_id]["detail"]
        assert read(session, job_id).state == "failed"

    def test_cancels_what_was_to_be_cancelled(self, session: Session, edit: Edit, failures: Failures) -> None:
        job_id = expire(session, edit, cancel_requested=True)
        requeue_expired(session, max_attempts=5, fail=failures)
        assert failures.problems == {job_id: CANCELLED}


class TestRingAgain:
    def test_rings_for_what_nobody_heard(self, session: Session, edit: Edit, bell: RecordingBell) -> None:
        job_id = enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit.id, actor="test")
        dispatch(session, bell=RecordingBell())  # heard by nobody
        assert ring_again(session, bell=bell) == 0
        long_ago = func.now() - timedelta(seconds=UNHEARD_SECONDS + 1)
        session.execute(update(Job).values(created_at=long_ago))
        assert ring_again(session, bell=bell) == 1
        assert bell.rung == [job_id]

    def test_leaves_what_the_dispatcher_is_to_ring_for(self, session: Session, edit: Edit, bell: RecordingBell) -> None:
        enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit.id, actor="test")
        session.execute(update(Job).values(created_at=func.now() - timedelta(seconds=UNHEARD_SECONDS + 1)))
        assert ring_again(session, bell=bell) == 0
