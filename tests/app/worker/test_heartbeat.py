import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update
from uuid_utils.compat import uuid7

from app.db.engine import Sessions, connect, sessions
from app.db.models import Job
from app.jobs import leases
from app.jobs.enqueue import enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT
from app.jobs.leases import Lease
from app.settings import Settings
from app.worker.heartbeat import Heartbeat
from emender.schemas.common import Progress
from tests.patience import patience


@pytest.fixture
def held(factory: Sessions) -> list[Lease]:
    """Two leases of five seconds."""
    with factory() as session:
        enqueue_many(session, kind=OPTIMIZE_EDIT, actor="test", target_ids=[uuid7(), uuid7()])
        claimed = leases.claim(session, worker="w", lease_seconds=5, candidates=select(Job.id), limit=2)
        session.commit()
        return claimed


@pytest.fixture
def heartbeat(factory: Sessions) -> Heartbeat:
    return Heartbeat(factory, lease_seconds=60, interval=0.05)


def change(factory: Sessions, lease: Lease, **columns: object) -> None:
    with factory() as session:
        session.execute(update(Job).where(Job.id == lease.job_id).values(**columns))
        session.commit()


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + patience(10)
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_leases_are_renewed_until_the_block_ends(
    heartbeat: Heartbeat, held: list[Lease], job: Callable[[UUID], Job]
) -> None:
    def remaining() -> timedelta:
        expiry = job(held[0].job_id).lease_expires_at
        assert expiry is not None
        return expiry - datetime.now(UTC)

    assert remaining() < timedelta(seconds=6)
    with heartbeat.holding(held):
        assert soon(lambda: remaining() > timedelta(seconds=50))
    after = job(held[0].job_id).lease_expires_at
    heartbeat.beat()  # as maintenance does
    time.sleep(0.3)
    assert job(held[0].job_id).lease_expires_at == after


def test_leases_are_renewed_three_times_per_lease(factory: Sessions) -> None:
    assert Heartbeat(factory, lease_seconds=3, interval=60).interval == 1


def test_the_latest_progress_is_written(heartbeat: Heartbeat, held: list[Lease], job: Callable[[UUID], Job]) -> None:
    with heartbeat.holding(held):
        for step in range(100):
            heartbeat.report(held[1], Progress(stage="optimizing", done=step, total=100))
        assert soon(lambda: job(held[1].job_id).progress == {"stage": "optimizing", "done": 99, "total": 100})
    assert job(held[0].job_id).progress is None


def test_a_requested_cancel_is_read(heartbeat: Heartbeat, held: list[Lease], factory: Sessions) -> None:
    with heartbeat.holding(held):
        change(factory, held[1], cancel_requested=True)
        assert soon(lambda: heartbeat.is_cancelled(held[1]))
        assert not heartbeat.is_cancelled(held[0]) and not heartbeat.is_lost(held[1])


def test_a_lost_lease_is_noticed(heartbeat: Heartbeat, held: list[Lease], factory: Sessions) -> None:
    with heartbeat.holding(held):
        change(factory, held[0], attempt=2)
        assert soon(lambda: heartbeat.is_lost(held[0]))
        assert not heartbeat.is_lost(held[1])


def test_a_finished_job_is_not_a_lost_lease(heartbeat: Heartbeat, held: list[Lease], factory: Sessions) -> None:
    with heartbeat.holding(held):
        change(factory, held[0], state="succeeded")
        heartbeat.forget(held[0])
        heartbeat.beat()
        assert not heartbeat.is_lost(held[0])


def test_the_heartbeat_continues_while_the_database_is_unreachable(settings: Settings, held: list[Lease]) -> None:
    assert settings.database_url is not None
    away = connect(SecretStr("postgresql://nobody@127.0.0.1:1/none").get_secret_value())
    heartbeat = Heartbeat(sessions(away), lease_seconds=60, interval=0.05)
    with heartbeat.holding(held):
        time.sleep(0.3)
        assert not heartbeat.is_lost(held[0])
    away.dispose()
