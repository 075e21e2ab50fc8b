"""A worker that is killed, stopped or told to go: the work completes, once."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import httpx
import psutil
import pytest
from safetensors import safe_open

from app.local.child_process import die_with_parent
from app.storage.local import LocalStore
from tests.faults.conftest import LEASE_SECONDS, QUICK, SLOW, JobTable, Site, WorkerProcess, wait
from tests.patience import patience
from tests.servers import environment, free_port

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

StartWorker = Callable[..., WorkerProcess]

ESTIMATED = 12_000  # captions: some seconds on the tiny pipeline


@pytest.fixture
def workers(start_worker: StartWorker, job_table: JobTable) -> list[WorkerProcess]:
    """Two workers, ready to claim, and a model that is registered."""
    workers = [start_worker(), start_worker()]
    job_table.await_state(job_table.register(), "succeeded")
    for worker in workers:
        wait(lambda worker=worker: worker, lambda worker: worker.says("worker started"), timeout=240)  # type: ignore[misc]
    return workers


@pytest.fixture
def worker(start_worker: StartWorker, job_table: JobTable) -> WorkerProcess:
    """One worker, and a model that is registered."""
    worker = start_worker()
    job_table.await_state(job_table.register(), "succeeded")
    return worker


def at_work(job_table: JobTable, job_id: UUID, workers: list[WorkerProcess]) -> WorkerProcess:
    """Wait until an edit is in the middle of its steps; the worker that holds it."""
    job_table.await_step(job_id)
    name = job_table.job(job_id).worker
    (holder,) = [worker for worker in workers if name is not None and name.endswith(f"-{worker.pid}")]
    return holder


def assert_done_once(job_table: JobTable, job_id: UUID, *, attempt: int) -> None:
    job, edit = job_table.job(job_id), job_table.edit(job_id)
    assert (job.state, job.attempt, edit.state, edit.problem) == ("succeeded", attempt, "ready", None)
    assert edit.value is not None and edit.value.attempt == attempt
    assert job_table.count("edit.ready") == 1


def test_an_edit_of_a_killed_worker_is_done_by_another(
    workers: list[WorkerProcess], job_table: JobTable, outcome: Callable[..., None]
) -> None:
    job_id = job_table.add_edit(SLOW)
    at_work(job_table, job_id, workers).kill()
    killed = time.monotonic()
    wait(lambda: job_table.job(job_id), lambda job: job.attempt == 2, timeout=30)
    recovery = time.monotonic() - killed
    assert recovery >= LEASE_SECONDS / 2, "it was taken from a worker that was alive"
    job_table.await_state(job_id, "succeeded")
    assert_done_once(job_table, job_id, attempt=2)
    tally = job_table.tally([job_table.edit(job_id).id])
    outcome(1, "`kill -9` of a worker in an edit", recovery=recovery, note="attempt 2 started, then done", **tally)


@pytest.mark.long
@pytest.mark.parametrize("victims", [("parent",), ("worker", "parent")], ids=["parent", "both"])
def test_a_worker_ends_when_its_parent_is_killed(
    site: Site, victims: tuple[str, ...], tmp_path: Path, outcome: Callable[..., None]
) -> None:
    """`emender serve` dies, without and with its worker, and is started again as an operator's service manager does."""

    def serve() -> subprocess.Popen[bytes]:
        settings = site.settings.model_copy(update={"port": free_port()})
        with (tmp_path / "serve.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "app.cli.main", "serve"],
                env=environment(settings),
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(),
            )

    edit_id = UUID(site.post_edit("cat", settings=SLOW).json()["id"])
    job_id = site.job_table.latest_job(edit_id)
    with serve() as first:
        site.job_table.await_step(job_id)
        children = psutil.Process(first.pid).children()
        (worker,) = [child for child in children if "app.worker.main" in child.cmdline()]
        processes = {"parent": psutil.Process(first.pid), "worker": worker}
        for victim in victims:
            processes[victim].kill()
        killed = time.monotonic()
        psutil.wait_procs(children, timeout=patience(60))
    with serve() as second:
        attempts = len(victims)  # a worker that lost its parent gives its work back, which costs no attempt
        site.job_table.await_step(job_id, attempt=attempts)
        recovery = time.monotonic() - killed
        site.job_table.await_state(job_id, "succeeded")
        assert_done_once(site.job_table, job_id, attempt=attempts)
        second.terminate()
        second.wait(patience(60))
    what = "a worker and its parent" if "worker" in victims else "a worker's parent"
    note = f"attempt {attempts} started, after the start of another"
    outcome(1, f"`kill -9` of {what} in an edit", recovery=recovery, note=note, **site.job_table.tally([edit_id]))


def test_a_worker_paused_past_its_lease_writes_no_result(
    workers: list[WorkerProcess], job_table: JobTable, outcome: Callable[..., None]
) -> None:
    job_id = job_table.add_edit(SLOW)
    stopped = at_work(job_table, job_id, workers)
    stopped.send(signal.SIGSTOP)
    job_table.await_state(job_id, "succeeded")
    assert_done_once(job_table, job_id, attempt=2)
    value = job_table.edit(job_id).value
    stopped.send(signal.SIGCONT)
    for other in workers:
        if other is not stopped:
            other.stop()
    job_table.await_state(job_table.add_edit(QUICK, source="next"), "succeeded")  # by the one that was stopped
    assert stopped.says("lease lost")
    after = job_table.edit(job_id).value
    assert value is not None and after is not None
    assert (after.sha256, after.attempt, after.created_at) == (value.sha256, 2, value.created_at)
    note = "its write was refused; the value is that of attempt 2"
    outcome(2, "SIGSTOP of a worker past its lease, SIGCONT", note=note, **job_table.tally([job_table.edit(job_id).id]))


@pytest.mark.long
def test_a_later_worker_does_the_edit_of_a_killed_one(
    worker: WorkerProcess, start_worker: StartWorker, job_table: JobTable
) -> None:
    job_id = job_table.add_edit(SLOW)
    job_table.await_step(job_id)
    worker.kill()
    time.sleep(LEASE_SECONDS + 1)
    assert job_table.job(job_id).state == "running"  # not found yet
    start_worker()
    job_table.await_state(job_id, "succeeded")
    assert_done_once(job_table, job_id, attempt=2)


@pytest.mark.long
def test_a_job_that_kills_its_worker_each_time_fails(
    worker: WorkerProcess, start_worker: StartWorker, job_table: JobTable
) -> None:
    """An edit that takes its worker down with it is given up, and the next edits are done."""
    job_id = job_table.add_edit(SLOW)
    for attempt in (1, 2):
        job_table.await_step(job_id, attempt=attempt)
        worker.kill()
        worker = start_worker(EMENDER_MAX_ATTEMPTS="2")
    job_table.await_state(job_id, "failed")
    edit = job_table.edit(job_id)
    assert edit.state == "failed" and edit.value is None
    assert edit.problem is not None and edit.problem["title"] == "Worker lost"
    job_table.await_state(job_table.add_edit(QUICK), "succeeded")


def test_a_terminated_worker_requeues_its_job(start_worker: StartWorker, job_table: JobTable) -> None:
    port = free_port()
    worker = start_worker(EMENDER_METRICS_PORT=str(port))
    job_table.await_state(job_table.register(), "succeeded")
    job_id = job_table.add_edit(SLOW)
    job_table.await_step(job_id)
    assert job_table.alive() == 1
    samples = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert 'emender_job_seconds_count{kind="register_model",outcome="succeeded"} 1.0' in samples
    told = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - told < patience(15)
    assert job_table.alive() == 0
    assert f'"jobs": ["{job_id}"]' in worker.log.read_text()
    job = job_table.job(job_id)
    assert (job.state, job.attempt, job_table.edit(job_id).state) == ("queued", 0, "queued")
    start_worker()
    job_table.await_state(job_id, "succeeded")
    assert_done_once(job_table, job_id, attempt=1)


def test_an_estimate_of_a_killed_worker_resumes(
    worker: WorkerProcess, start_worker: StartWorker, job_table: JobTable, tmp_path: Path
) -> None:
    """The next attempt goes on from the sums that were kept, and its bytes are those of an estimate left in peace."""
    store = LocalStore(tmp_path / "var" / "store")
    captions = [f"thing {n} beside {n % 97} others" for n in range(ESTIMATED)]
    job_id = job_table.add_statistics(store, captions)

    def kept() -> int:
        """How many captions the sums on disk hold."""
        for sums in (tmp_path / "var" / "estimates").glob("*/*.safetensors"):
            with safe_open(sums, framework="np") as file:
                return int(json.loads(file.metadata()["partial_sums"])["captions"])
        return 0

    wait(lambda: worker, lambda _: kept() > 500, timeout=240)
    worker.kill()
    assert job_table.job(job_id).state == "running", "too late: it is done"
    before = kept()

    other = start_worker()
    job = wait(lambda: job_table.job(job_id), lambda job: job.attempt == 2 and bool(job.progress), timeout=240)
    assert job.progress is not None and job.progress["done"] >= before
    assert other.says("estimate continues")
    job_table.await_state(job_id, "succeeded")
    assert not other.says("estimate starts again")
    job_table.await_state(again := job_table.add_statistics(store, captions), "succeeded")
    killed, peaceful = job_table.statistics(job_id), job_table.statistics(again)
    assert (killed.state, killed.digest, killed.tokens) == ("ready", peaceful.digest, peaceful.tokens)
    wait(lambda: other, lambda _: not any((tmp_path / "var" / "estimates").iterdir()), timeout=30)
