"""Postgres killed in the middle of an edit: the worker waits for it, and the edit completes, once."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.db.embedded import EmbeddedPostgres
from app.db.engine import connect, sessions
from app.db.migrate import upgrade
from tests.faults.conftest import SLOW, Ledger, WorkerProcess

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]


def test_killed_in_the_middle_of_an_edit(start_worker: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o711)  # under root the server runs as nobody
    with EmbeddedPostgres(tmp_path / "postgres") as postgres:
        engine = connect(postgres.url)
        upgrade(engine)
        ledger = Ledger(sessions(engine))
        worker = start_worker(EMENDER_DATABASE_URL=postgres.url, EMENDER_LEASE_SECONDS="30")
        ledger.await_state(ledger.register(), "succeeded")
        job_id = ledger.add_edit(SLOW)
        ledger.await_step(job_id)
        os.kill(int((tmp_path / "postgres/postgres/postmaster.pid").read_text().split("\n")[0]), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not worker.says("the database does not answer"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not postgres.running
        postgres.start()
        job = ledger.await_state(job_id, "succeeded")
        assert [value.attempt for value in ledger.edit(job_id).values] == [job.attempt]
        assert ledger.count("edit.ready") == 1 and worker.status is None
        engine.dispose()
