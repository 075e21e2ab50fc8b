import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job, Outbox
from app.queueing.outbox import enqueue, enqueue_many


def test_a_job_and_its_announcement_are_of_one_transaction(session: Session) -> None:
    target = uuid7()
    job_id = enqueue(session, kind="optimize_edit", target_id=target)
    job = session.get_one(Job, job_id)
    assert (job.state, job.attempt, job.target_id) == ("queued", 0, target)
    assert session.scalars(select(Outbox.job_id)).all() == [job_id]
    session.rollback()
    assert session.scalars(select(Job)).all() == [] and session.scalars(select(Outbox)).all() == []


def test_many_keep_their_order(session: Session) -> None:
    targets = [uuid7() for _ in range(5)]
    job_ids = enqueue_many(session, kind="optimize_edit", target_ids=targets)
    assert job_ids == sorted(job_ids)
    assert session.scalars(select(Job.target_id).order_by(Job.id)).all() == targets
    assert session.scalars(select(Outbox.job_id).order_by(Outbox.id)).all() == job_ids


def test_an_unknown_kind_is_refused(session: Session) -> None:
    with pytest.raises(IntegrityError, match="ck_jobs_kind"):
        enqueue(session, kind="mine_bitcoin", target_id=uuid7())
