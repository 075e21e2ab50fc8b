from dataclasses import replace

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job
from app.jobs import leases
from app.jobs.enqueue import enqueue, enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT


def test_a_job_is_part_of_the_transaction(session: Session) -> None:
    target = uuid7()
    job_id = enqueue(session, kind=OPTIMIZE_EDIT, target_id=target, actor="test")
    job = session.get_one(Job, job_id)
    assert (job.state, job.attempt, job.target_id) == ("queued", 0, target)
    session.rollback()
    assert session.scalars(select(Job)).all() == []


def test_many_jobs_keep_their_order(session: Session) -> None:
    targets = [uuid7() for _ in range(5)]
    job_ids = enqueue_many(session, kind=OPTIMIZE_EDIT, actor="test", target_ids=targets)
    assert job_ids == sorted(job_ids)
    assert session.scalars(select(Job.target_id).order_by(Job.id)).all() == targets


def test_an_unknown_kind_is_refused(session: Session) -> None:
    enqueue(session, kind=replace(OPTIMIZE_EDIT, name="mine_bitcoin"), target_id=uuid7(), actor="test")
    with pytest.raises(IntegrityError, match="ck_jobs_kind"):
        session.flush()


def next_actor(session: Session) -> str:
    (lease,) = leases.claim(session, worker="w", lease_seconds=30, candidates=select(Job.id))
    return session.get_one(Job, lease.job_id).created_by


class TestFairOrder:
    def test_a_batch_does_not_delay_another_actor(self, session: Session) -> None:
        enqueue_many(session, kind=OPTIMIZE_EDIT, actor="key:many", target_ids=[uuid7() for _ in range(5000)])
        enqueue(session, kind=OPTIMIZE_EDIT, target_id=uuid7(), actor="key:one")
        assert "key:one" in [next_actor(session), next_actor(session)]

    def test_a_newcomer_alternates_with_a_batch_that_runs(self, session: Session) -> None:
        enqueue_many(session, kind=OPTIMIZE_EDIT, actor="key:many", target_ids=[uuid7() for _ in range(20)])
        for _ in range(10):
            assert next_actor(session) == "key:many"
        enqueue_many(session, kind=OPTIMIZE_EDIT, actor="key:few", target_ids=[uuid7(), uuid7()])
        found = [next_actor(session) for _ in range(6)]
        assert found == ["key:many", "key:few", "key:many", "key:few", "key:many", "key:many"]

    def test_an_actor_that_was_served_alone_owes_nothing(self, session: Session) -> None:
        enqueue_many(session, kind=OPTIMIZE_EDIT, actor="key:many", target_ids=[uuid7() for _ in range(20)])
        for _ in range(20):
            next_actor(session)
        enqueue(session, kind=OPTIMIZE_EDIT, target_id=uuid7(), actor="key:many")
        enqueue(session, kind=OPTIMIZE_EDIT, target_id=uuid7(), actor="key:one")
        assert [next_actor(session), next_actor(session)] == ["key:many", "key:one"]
