from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, event, func, select, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Job
from app.jobs import leases
from app.jobs.leases import Lease, LeaseLost
from emender.schemas.common import Progress


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
    return leases.claim(session, worker="w", lease_seconds=seconds, candidates=select(Job.id), limit=limit)


def let_expire(session: Session, lease: Lease) -> None:
    past = func.now() - timedelta(seconds=1)
    session.execute(update(Job).where(Job.id == lease.job_id).values(lease_expires_at=past))


class TestClaim:
    def test_takes_the_oldest_and_counts_the_attempt(self, session: Session) -> None:
        first, second, _ = add_jobs(session, 3)
        claimed = claim(session, limit=2)
        assert [(lease.job_id, lease.attempt) for lease in claimed] == [(first, 1), (second, 1)]
        job = session.get_one(Job, first)
        assert job.state == "running" and job.worker == "w" and job.lease_expires_at is not None

    def test_only_among_the_candidates(self, session: Session) -> None:
        add_jobs(session)
        assert leases.claim(session, worker="w", lease_seconds=1, candidates=select(Job.id).where(False)) == []

    def test_what_runs_is_not_claimed_again(self, session: Session) -> None:
        add_jobs(session)
        assert len(claim(session)) == 1
        assert claim(session) == []

    def test_a_batch_that_was_never_analyzed_is_not_sorted(self, session: Session) -> None:
        add_jobs(session, 500)
        statements: list[tuple[str, object]] = []

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

    def test_by_turn_before_age(self, session: Session) -> None:
        first, second, third = add_jobs(session, 3)
        session.execute(update(Job).where(Job.id == first).values(turn=1))
        claimed = [lease.job_id for _ in range(3) for lease in claim(session)]
        assert claimed == [second, third, first]


class TestFence:
    def test_the_attempt_that_holds_the_job_ends_it(self, session: Session) -> None:
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
            leases.hold(session, lease=stale)
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
        leases.report(session, lease=stale, progress=Progress(stage="optimizing", done=1, total=2))
        assert session.get_one(Job, stale.job_id, populate_existing=True).progress is None

    def test_holding_keeps_a_cancel_out(self, clean_database: Engine, other: Session) -> None:
        with Session(clean_database) as session:
            add_jobs(session)
            (lease,) = claim(session)
            session.commit()
            assert leases.hold(session, lease=lease) is False
            locked = select(Job.id).where(Job.id == lease.job_id).with_for_update(skip_locked=True)
            assert other.scalars(locked).all() == []


class TestRenew:
    def test_extends_and_brings_back_the_cancel_flag(self, session: Session) -> None:
        add_jobs(session, 2)
        first, second = claim(session, limit=2, seconds=1)
        session.execute(update(Job).where(Job.id == second.job_id).values(cancel_requested=True))
        before = session.get_one(Job, first.job_id, populate_existing=True).lease_expires_at
        renewed = leases.renew(session, leases=[first, second], lease_seconds=60)
        assert renewed == {first.job_id: False, second.job_id: True}
        after = session.get_one(Job, first.job_id, populate_existing=True).lease_expires_at
        assert before is not None and after is not None and after - before > timedelta(seconds=50)


class TestGiveBack:
    def test_release_does_not_count_the_attempt(self, session: Session) -> None:
        add_jobs(session)
        (lease,) = claim(session)
        leases.release(session, lease=lease)
        (again,) = claim(session)
        assert again.attempt == 1

    def test_expired_finds_only_leases_that_ran_out(self, session: Session) -> None:
        add_jobs(session, 2)
        gone, alive = claim(session, limit=2)
        let_expire(session, gone)
        assert [job.id for job in leases.expired(session)] == [gone.job_id]
        assert alive.job_id != gone.job_id
