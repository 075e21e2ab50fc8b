"""Postgres killed or restarted in the middle of an edit and of a request: both wait for it, and are done once."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import func, select, text

from app.db.models import Edit
from tests.faults.conftest import SLOW, own_site, postmaster, until
from tests.patience import patience

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

LEASE, BATCH = patience(30.0), 12


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=["killed", "restarted"]
)
def test_work_continues_after_postgres_ends(
    number: signal.Signals, base_folder: Path, tmp_path: Path, outcome: Callable[..., None]
) -> None:
    """Each job keeps its lease and succeeds in attempt 1, even if its work ends while Postgres is away.

    This failed on fast machines with "a lease did not survive": the worker dropped a result that it could not write.
    """
    with own_site(tmp_path, base_folder, lease_seconds=LEASE) as (site, postgres):
        posted = [site.post_edit(f"cat {number}", settings=SLOW) for number in range(BATCH)]
        ids = [UUID(answer.json()["id"]) for answer in posted]
        jobs = [site.job_table.latest_job(edit_id) for edit_id in ids]
        worker = site.start_worker()
        site.job_table.await_step(jobs[0])

        key = {"Idempotency-Key": "once"}
        with site.engine.connect() as other, ThreadPoolExecutor(1) as pool:
            other.execute(text("LOCK TABLE edits IN EXCLUSIVE MODE"))  # what is asked now is in the middle for long
            asked = pool.submit(site.post_edit, "old cat", headers=key)
            waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'edits'")
            with site.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
                until(lambda: watcher.scalar(waiting), timeout=30)
                watcher.invalidate()
            os.kill(postmaster(postgres), number)
            gone = time.monotonic()
            answers = [asked.result()]
            other.invalidate()
        until(lambda: not postgres.is_running, timeout=30)
        answers.append(site.post_edit("old cat", headers=key))
        answers.append(site.ask("GET", f"/v1/edits/{ids[0]}"))
        answers.append(site.ask("GET", "/readyz"))
        for answer in answers:
            assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
            assert int(answer.headers["Retry-After"]) > 0
        until(lambda: worker.says("the database does not answer"), timeout=30)
        assert time.monotonic() - gone < LEASE, "too slow a machine: the lease has run out"
        postgres.start()
        back = time.monotonic()
        until(lambda: site.post_edit("old cat", headers=key).status_code == 202, timeout=30)
        recovery = time.monotonic() - back
        with site.sessions() as session:
            assert session.scalar(select(func.count()).select_from(Edit)) == BATCH + 1
            ids.append(session.scalars(select(Edit.id).where(Edit.source == "old cat")).one())
        for edit_id in ids:
            site.job_table.await_state(site.job_table.latest_job(edit_id), "succeeded")
        assert {site.job_table.job(job_id).attempt for job_id in jobs} == {1}, "a lease did not survive"
        assert worker.status is None
        tally = site.job_table.tally(ids)
        assert tally == {"lost": 0, "doubled": 0}
        how = "`kill -9` of" if number == signal.SIGKILL else "restart of"
        note = "503 with Retry-After; attempt 1; recovery from its return"
        outcome(6, f"{how} Postgres in a request and in a job", recovery=recovery, note=note, **tally)
