"""Redis flushed, killed, away: nothing is lost, and the workers come back by themselves."""

import time
from collections.abc import Callable
from uuid import UUID

import pytest
from pydantic import SecretStr

from app.jobs.notifier import notify_after_commit
from app.jobs.redis_notifier import RedisNotifier
from tests.faults.conftest import QUICK, SLOW, JobTable, Site, WorkerProcess, until
from tests.patience import patience
from tests.servers import RedisServer

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def worker(start_worker: StartWorker, job_table: JobTable, redis_server: RedisServer) -> WorkerProcess:
    """A worker on Redis that has registered the model. The test's sessions notify it of jobs."""
    notify_after_commit(job_table.factory, RedisNotifier(redis_server.url, poll_seconds=1))
    worker = start_worker(EMENDER_REDIS_URL=redis_server.url)
    job_table.await_state(job_table.register(), "succeeded")
    return worker


def test_a_notified_worker_claims_a_job_within_a_second(worker: WorkerProcess, job_table: JobTable) -> None:
    """The sweeper notifies after five seconds, so only the notification after the commit is this fast."""
    job = job_table.await_state(job_table.add_edit(QUICK), "succeeded")
    assert job.started_at is not None
    assert (job.started_at - job.created_at).total_seconds() < patience(1)


def test_a_flushed_redis_loses_no_job(
    worker: WorkerProcess,
    start_worker: StartWorker,
    job_table: JobTable,
    redis_server: RedisServer,
    outcome: Callable[..., None],
) -> None:
    worker.stop()
    job_id = job_table.add_edit(QUICK)
    with redis_server.client() as client:
        until(lambda: client.lrange("rq:queue:emender", 0, -1) == [str(job_id).encode()], timeout=10)
        client.flushall()
    start_worker(EMENDER_REDIS_URL=redis_server.url)
    job_table.await_state(job_id, "succeeded")
    assert job_table.job(job_id).attempt == 1 and job_table.edit(job_id).value is not None
    outcome(5, "Redis FLUSHALL with a job announced", **job_table.tally([job_table.edit(job_id).id]))


def test_a_worker_polls_without_redis_and_reconnects(
    worker: WorkerProcess, job_table: JobTable, redis_server: RedisServer
) -> None:
    redis_server.kill()
    without = job_table.add_edit(QUICK, source="without")
    job_table.await_state(without, "succeeded")
    assert worker.says("Redis does not answer; polling until it is back")
    redis_server.start()
    deadline = time.monotonic() + patience(20)
    while not worker.says("Redis is back"):
        assert time.monotonic() < deadline, "it did not come back to Redis"
        time.sleep(0.1)
    asked = time.monotonic()
    again = job_table.add_edit(QUICK, source="again")
    job_table.await_state(again, "succeeded")
    assert time.monotonic() - asked < patience(10)
    assert worker.status is None and job_table.job(without).attempt == job_table.job(again).attempt == 1


def test_a_redis_killed_during_an_edit_does_not_stop_it(
    worker: WorkerProcess, job_table: JobTable, redis_server: RedisServer, outcome: Callable[..., None]
) -> None:
    job_id = job_table.add_edit(SLOW)
    job_table.await_step(job_id)
    redis_server.kill()
    job = job_table.await_state(job_id, "succeeded")
    assert job.attempt == 1 and worker.status is None
    job_table.await_state(job_table.add_edit(QUICK, source="next"), "succeeded")
    outcome(5, "`kill -9` of Redis in an edit", note="attempt 1", **job_table.tally([job_table.edit(job_id).id]))


@pytest.mark.long
def test_edits_are_accepted_and_done_during_an_outage_of_redis(
    site: Site, redis_server: RedisServer, outcome: Callable[..., None]
) -> None:
    """API and worker know Redis; each edit is accepted at once, and done although Redis is away."""
    site.api.stop()
    site.api.settings = site.settings.model_copy(update={"redis_url": SecretStr(redis_server.url)})
    site.api.start()
    worker = site.start_worker(EMENDER_REDIS_URL=redis_server.url)
    worker.await_start()
    assert site.post_edit("before").status_code == 202
    redis_server.kill()
    gone, slowest = time.monotonic(), 0.0
    ids: list[UUID] = []
    while time.monotonic() - gone < 60:
        asked = time.monotonic()
        answer = site.post_edit(f"cat {len(ids)}")
        slowest = max(slowest, time.monotonic() - asked)
        assert answer.status_code == 202, answer.text
        ids.append(UUID(answer.json()["id"]))
        time.sleep(1)
    redis_server.start()
    recovery = until(lambda: worker.says("Redis is back"), timeout=30)
    until(lambda: site.job_table.tally(ids)["lost"] == 0, timeout=120)
    assert worker.status is None
    with redis_server.client() as client:
        until(lambda: client.llen("rq:queue:emender") == 0, timeout=30)
    tally = site.job_table.tally(ids)
    assert tally == {"lost": 0, "doubled": 0}
    note = f"{len(ids)} POSTs meanwhile, all 202, the slowest in {slowest:.1f} s; recovery from its return"
    outcome(5, "Redis away for 60 s", recovery=recovery, note=note, **tally)


def test_jobs_are_done_without_redis_from_the_start(
    start_worker: StartWorker, job_table: JobTable, redis_server: RedisServer
) -> None:
    redis_server.kill()
    worker = start_worker(EMENDER_REDIS_URL=redis_server.url)
    job_table.await_state(job_table.register(), "succeeded")
    assert worker.stop() == 0
