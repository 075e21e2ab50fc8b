"""Redis flushed, killed, away: nothing is lost, and the workers come back by themselves."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from app.queueing.dispatcher import dispatch
from app.queueing.rq import RedisBell
from tests.faults.conftest import QUICK, SLOW, Ledger, WorkerProcess
from tests.servers import RedisServer

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def worker(start_worker: StartWorker, ledger: Ledger, redis_server: RedisServer) -> WorkerProcess:
    """A worker on Redis that has registered the model."""
    worker = start_worker(EMENDER_REDIS_URL=redis_server.url)
    ledger.await_state(ledger.register(), "succeeded")
    return worker


def test_flushed_between_the_post_and_the_work(
    worker: WorkerProcess, start_worker: StartWorker, ledger: Ledger, redis_server: RedisServer
) -> None:
    worker.stop()
    job_id = ledger.add_edit(QUICK)
    with ledger.factory() as session:
        dispatch(session, bell=RedisBell(redis_server.url, poll_seconds=1))
        session.commit()
    with redis_server.client() as client:
        assert client.lrange("rq:queue:emender", 0, -1) == [str(job_id).encode()]
        client.flushall()
    start_worker(EMENDER_REDIS_URL=redis_server.url)
    ledger.await_state(job_id, "succeeded")
    assert ledger.job(job_id).attempt == 1 and len(ledger.edit(job_id).values) == 1


def test_a_dispatcher_killed_between_the_commit_and_the_ring(
    worker: WorkerProcess,
    start_worker: StartWorker,
    database_url: str,
    ledger: Ledger,
    redis_server: RedisServer,
) -> None:
    """It holds the outbox's row when it dies; the next one rings."""
    worker.stop()  # only to have nobody else dispatch meanwhile
    program = (
        "import sys, time\n"
        "from app.db.engine import connect, sessions\n"
        "from app.queueing.dispatcher import dispatch\n"
        "class Hanging:\n"
        "    def ring(self, job_ids): sys.stdout.write('ringing\\n'); sys.stdout.flush(); time.sleep(60)\n"
        "dispatch(sessions(connect(sys.argv[1]))(), bell=Hanging())"
    )
    job_id = ledger.add_edit(QUICK)
    with subprocess.Popen([sys.executable, "-c", program, database_url], stdout=subprocess.PIPE) as dispatcher:
        assert dispatcher.stdout is not None and dispatcher.stdout.readline() == b"ringing\n"
        dispatcher.kill()
    with redis_server.client() as client:
        assert client.lrange("rq:queue:emender", 0, -1) == []
    start_worker(EMENDER_REDIS_URL=redis_server.url)
    ledger.await_state(job_id, "succeeded")
    assert ledger.job(job_id).attempt == 1


def test_killed_and_back(worker: WorkerProcess, ledger: Ledger, redis_server: RedisServer) -> None:
    redis_server.kill()
    without = ledger.add_edit(QUICK, source="without")
    ledger.await_state(without, "succeeded")
    assert worker.says("Redis does not answer; polling meanwhile")
    redis_server.start()
    deadline = time.monotonic() + 20
    while not worker.says("Redis is back"):
        assert time.monotonic() < deadline, "it did not come back to Redis"
        time.sleep(0.1)
    asked = time.monotonic()
    again = ledger.add_edit(QUICK, source="again")
    ledger.await_state(again, "succeeded")
    assert time.monotonic() - asked < 10
    assert worker.status is None and ledger.job(without).attempt == ledger.job(again).attempt == 1


def test_killed_in_the_middle_of_an_edit(worker: WorkerProcess, ledger: Ledger, redis_server: RedisServer) -> None:
    job_id = ledger.add_edit(SLOW)
    ledger.await_step(job_id)
    redis_server.kill()
    job = ledger.await_state(job_id, "succeeded")
    assert job.attempt == 1 and worker.status is None
    ledger.await_state(ledger.add_edit(QUICK, source="next"), "succeeded")


def test_away_from_the_start(start_worker: StartWorker, ledger: Ledger, redis_server: RedisServer) -> None:
    redis_server.kill()
    worker = start_worker(EMENDER_REDIS_URL=redis_server.url)
    ledger.await_state(ledger.register(), "succeeded")
    assert worker.stop() == 0
