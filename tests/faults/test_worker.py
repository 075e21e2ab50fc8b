"""A worker that is killed, stopped or told to go: the edit completes, once."""

import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import LEASE_SECONDS, QUICK, SLOW, Ledger, WorkerProcess

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def worker(start_worker: StartWorker, ledger: Ledger) -> WorkerProcess:
    """A worker that has registered the model."""
    worker = start_worker()
    ledger.await_state(ledger.register(), "succeeded")
    return worker


def assert_done_once(ledger: Ledger, job_id: object, *, attempt: int) -> None:
    job, edit = ledger.job(job_id), ledger.edit(job_id)  # type: ignore[arg-type]
    assert (job.state, job.attempt, edit.state, edit.problem) == ("succeeded", attempt, "ready", None)
    assert [value.attempt for value in edit.values] == [attempt]
    assert ledger.count("edit.ready") == 1


def test_killed_in_the_middle_of_an_edit(worker: WorkerProcess, start_worker: StartWorker, ledger: Ledger) -> None:
    job_id = ledger.add_edit(SLOW)
    ledger.await_step(job_id)
    second = start_worker()  # already warm when the first dies, as others are in production
    time.sleep(1)
    worker.kill()
    killed = time.monotonic()
    ledger.await_step(job_id, attempt=2)
    assert time.monotonic() - killed < 30, "the second attempt began too late"
    ledger.await_state(job_id, "succeeded")
    assert_done_once(ledger, job_id, attempt=2)
    assert second.says("lease ran out")


def test_killed_with_nobody_else_there(worker: WorkerProcess, start_worker: StartWorker, ledger: Ledger) -> None:
    job_id = ledger.add_edit(SLOW)
    ledger.await_step(job_id)
    worker.kill()
    time.sleep(LEASE_SECONDS + 1)
    assert ledger.job(job_id).state == "running"  # nobody has seen it yet
    start_worker()
    ledger.await_state(job_id, "succeeded")
    assert_done_once(ledger, job_id, attempt=2)


def test_killed_each_time_it_fails(worker: WorkerProcess, start_worker: StartWorker, ledger: Ledger) -> None:
    """An edit that takes its worker down with it is given up, and the next edits are done."""
    job_id = ledger.add_edit(SLOW)
    for attempt in (1, 2):
        ledger.await_step(job_id, attempt=attempt)
        worker.kill()
        worker = start_worker(EMENDER_MAX_ATTEMPTS="2")
    ledger.await_state(job_id, "failed")
    edit = ledger.edit(job_id)
    assert edit.state == "failed" and edit.values == []
    assert edit.problem is not None and edit.problem["title"] == "Worker lost"
    ledger.await_state(ledger.add_edit(QUICK), "succeeded")


def test_stopped_past_its_lease_and_continued(worker: WorkerProcess, start_worker: StartWorker, ledger: Ledger) -> None:
    job_id = ledger.add_edit(SLOW)
    ledger.await_step(job_id)
    worker.send(signal.SIGSTOP)
    other = start_worker()
    ledger.await_state(job_id, "succeeded")
    assert_done_once(ledger, job_id, attempt=2)
    (value,) = ledger.edit(job_id).values
    worker.send(signal.SIGCONT)
    other.stop()
    ledger.await_state(ledger.add_edit(QUICK, source="next"), "succeeded")  # by the one that was stopped
    assert worker.says("lease lost")
    (after,) = ledger.edit(job_id).values
    assert (after.sha256, after.attempt, after.created_at) == (value.sha256, 2, value.created_at)


def test_told_to_go(worker: WorkerProcess, start_worker: StartWorker, ledger: Ledger) -> None:
    job_id = ledger.add_edit(SLOW)
    ledger.await_step(job_id)
    told = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - told < 10
    job = ledger.job(job_id)
    assert (job.state, job.attempt, ledger.edit(job_id).state) == ("queued", 0, "queued")
    start_worker()
    ledger.await_state(job_id, "succeeded")
    assert_done_once(ledger, job_id, attempt=1)
