from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, event, false, func, select, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job
from app.jobs import leases
from app.jobs.leases import Lease, LeaseLost
from app.jobs.queries import is_in_queue
from emender.schemas.common import Progress

WORK = select(Job.id).where(is_in_queue("work"))


@pytest.fixture
def other(clean_database: Engine) -> Iterator[Session]:
    """A session on a connection of its own, over committed rows."""
    with Session(clean_database) as session:
        yield session


def add_jobs(session: Session, count: int = 1) -> list[UUID]:
    jobs = [Job(kind="optimize_edit", target_id=uuid7()) for _ in range(count)]
    session.add_all(jobs)
    session.flush()
    return [job.id for job in jobs]


def claim(session: Session, *, limit: int = 1, seconds: float = 30.0) -> list[Lease]:
    return leases.claim(session, worker="w", lease_seconds=seconds, candidates=WORK, limit=limit)


def let_expire(session: Session, lease: Lease) -> None:
    past = func.now() - timedelta(seconds=1)
    session.execute(update(Job).where(Job.id == lease.job_id).values(lease_expires_at=past))


class TestClaim:
    def test_claims_the_oldest_and_counts_the_attempt(self, session: Session) -> None:
        first, second, _ = add_jobs(session, 3)
        claimed = claim(session, limit=2)
        assert [(lease.job_id, lease.attempt) for lease in claimed] == [(first, 1), (second, 1)]
        job = session.get_one(Job, first)
        assert job.state == "running" and job.worker == "w" and job.lease_expires_at is not None

    def test_claims_candidates_only(self, session: Session) -> None:
        add_jobs(session)
        assert leases.claim(session, worker="w", lease_seconds=1, candidates=select(Job.id).where(false())) == []

    def test_a_running_job_is_not_claimed_again(self, session: Session) -> None:
        add_jobs(session)
        assert len(claim(session)) == 1
        assert claim(session) == []

    def test_the_queue_is_read_by_its_index_before_it_is_analyzed(self, session: Session) -> None:
        add_jobs(session, 500)
        statements: list[tuple[str, Any]] = []

        def note(_: object, __: object, statement: str, parameters: object, *___: object) -> None:
            statements.append((statement, parameters))

        connection = session.connection()
        event.listen(connection, "before_cursor_execute", note)
        claim(session)
        event.remove(connection, "before_cursor_execute", note)
        (choice,) = [each for each in statements if "SKIP LOCKED" in each[0]]
        plan = " ".join(connection.exec_driver_sql(f"EXPLAIN {choice[0]}", choice[1]).scalars())
        assert "ix_jobs_queue" in plan and "Sort" not in plan, plan

    def test_two_claimers_never_share_a_job(self, clean_database: Engine, other: Session) -> None:
        with Session(clean_database) as session:
            add_jobs(session, 4)
            session.commit()
            ours = claim(session, limit=3)  # not committed: its rows are locked
            theirs = claim(other, limit=3)
            assert len(ours) == 3 and len(theirs) == 1
            assert {lease.job_id for lease in ours}.isdisjoint(lease.job_id for lease in theirs)

    def test_claims_in_fair_order_before_age(self, session: Session) -> None:
        first, second, third = add_jobs(session, 3)
        session.execute(update(Job).where(Job.id == first).values(fair_order=1))
        claimed = [lease.job_id for _ in range(3) for lease in claim(session)]
        assert claimed == [second, third, first]


class TestFence:
    def test_the_attempt_that_holds_the_lease_ends_the_job(self, session: Session) -> None:
        add_jobs(session)
        (lease,) = claim(session)
        leases.finish(session, lease=lease, state="succeeded")
        job = session.get_one(Job, lease.job_id, populate_existing=True)
        assert job.state == "succeeded" and job.finished_at is not None and job.lease_expires_at is None

    def test_a_stale_attempt_is_refused(self, session: Session) -> None:
        add_jobs(session)
        (stale,) = claim(session)
        leases.requeue(session, lease=stale)
        (current,) = claim(session)
        assert current.attempt == 2
        with pytest.raises(LeaseLost, match="attempt 1"):
            leases.finish(session, lease=stale, state="succeeded")
        with pytest.raises(LeaseLost):
            leases.lock(session, lease=stale)
        assert leases.renew(session, leases=[stale], lease_seconds=30) == {}
        leases.finish(session, lease=current, state="succeeded")

    def test_an_ended_job_is_not_ended_again(self, session: Session) -> None:
        add_jobs(session)
        (lease,) = claim(session)
        leases.finish(session, lease=lease, state="cancelled")
        with pytest.raises(LeaseLost):
            leases.finish(session, lease=lease, state="succeeded")

    def test_progress_of_a_stale_attempt_is_not_shown(self, session: Session) -> None:
        add_jobs(session)
        (stale,) = claim(session)
        leases.requeue(session, lease=stale)
        leases.write_progress(session, lease=stale, progress=Progress(stage="optimizing", done=1, total=2))
        assert session.get_one(Job, stale.job_id, populate_existing=True).progress is None

    def test_a_locked_job_takes_no_cancel(self, clean_database: Engine, other: Session) -> None:
        with Session(clean_database) as session:
            add_jobs(session)
            (lease,) = claim(session)
            session.commit()
            assert leases.lock(session, lease=lease) is False
            locked = select(Job.id).where(Job.id == lease.job_id).with_for_update(skip_locked=True)
            assert other.scalars(locked).all() == []


class TestRenew:
    def test_extends_the_lease_and_returns_the_cancel_flag(self, session: Session) -> None:
        add_jobs(session, 2)
        first, second = claim(session, limit=2, seconds=1)
        session.execute(update(Job).where(Job.id == second.job_id).values(cancel_requested=True))
        before = session.get_one(Job, first.job_id, populate_existing=True).lease_expires_at
        renewed = leases.renew(session, leases=[first, second], lease_seconds=60)
        assert renewed == {first.job_id: False, second.job_id: True}
        after = session.get_one(Job, first.job_id, populate_existing=True).lease_expires_at
        assert before is not None and after is not None and after - before > timedelta(seconds=50)


class TestRequeue:
    def test_an_attempt_that_is_not_counted(self, session: Session) -> None:
        add_jobs(session)
        (lease,) = claim(session)
        leases.requeue(session, lease=lease, counted=False)
        (again,) = claim(session)
        assert again.attempt == 1

    def test_a_delayed_job_is_not_claimed_before_it_is_due(self, session: Session) -> None:
        add_jobs(session)
        (lease,) = claim(session)
        leases.requeue(session, lease=lease, delay=60)
        assert claim(session) == []
        session.execute(update(Job).values(due_at=func.now()))
        (again,) = claim(session)
        assert again.attempt == 2

    def test_a_stale_attempt_cannot_requeue(self, session: Session) -> None:
        add_jobs(session)
        (stale,) = claim(session)
        leases.requeue(session, lease=stale)
        claim(session)
        with pytest.raises(LeaseLost):
            leases.requeue(session, lease=stale)

    def test_finds_expired_leases_only(self, session: Session) -> None:
        add_jobs(session, 2)
        gone, alive = claim(session, limit=2)
        let_expire(session, gone)
        assert [job.id for job in leases.find_expired(session)] == [gone.job_id]
        assert alive.job_id != gone.job_id
