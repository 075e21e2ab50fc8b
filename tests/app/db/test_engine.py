"""Closed connections, query plans and idle transactions."""

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import InternalError

from app.db.engine import connect
from tests.patience import patience


@pytest.fixture
def idle_limited(engine: Engine) -> Iterator[Engine]:
    made = connect(engine.url.render_as_string(hide_password=False), idle_seconds=0.5)
    yield made
    made.dispose()


def test_connection_closed_by_the_server_is_replaced(engine: Engine) -> None:
    made = connect(engine.url.render_as_string(hide_password=False), pool_size=2)
    with made.connect() as one, made.connect() as other, engine.connect() as admin:
        pids = [connection.execute(text("SELECT pg_backend_pid()")).scalar_one() for connection in (one, other)]
        for connection in (one, other):
            connection.rollback()
        admin.execute(
            text("SELECT pg_terminate_backend(pid, 10000) FROM unnest(CAST(:pids AS int[])) AS pid"), {"pids": pids}
        )
    for _ in range(3):
        with made.connect() as connection:
            assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() not in pids
    made.dispose()


def test_statements_are_planned_for_their_values(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(text("SHOW plan_cache_mode")).scalar_one() == "force_custom_plan"


def test_idle_transaction_is_ended_and_its_locks_released(engine: Engine, idle_limited: Engine) -> None:
    """A worker that is frozen within a heartbeat would otherwise keep its locks."""
    lock, free = text("SELECT pg_advisory_xact_lock(4711)"), text("SELECT pg_try_advisory_xact_lock(4711)")
    with idle_limited.connect() as frozen, engine.connect() as other:
        frozen.execute(lock)
        assert other.execute(free).scalar() is False
        deadline = time.monotonic() + patience(30)
        while not other.execute(free).scalar():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(InternalError):
            frozen.execute(text("SELECT 1"))
