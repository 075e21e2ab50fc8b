"""The Redis notifier against a real redis-server that is flushed and killed."""

import json
import queue
import threading
import time
import zlib
from collections.abc import Callable

import pytest
from rq import Queue
from rq.serializers import JSONSerializer
from uuid_utils.compat import uuid7

from app.jobs.notifier import NotifierUnavailable
from app.jobs.redis_notifier import RedisNotifier
from tests.patience import patience
from tests.servers import RedisServer, free_port

Listening = Callable[..., threading.Event]


@pytest.fixture
def notifier(redis_server: RedisServer) -> RedisNotifier:
    return RedisNotifier(redis_server.url, poll_seconds=0.1)


class Calls:
    """Work that counts its calls."""

    def __init__(self) -> None:
        self.calls: queue.Queue[float] = queue.Queue()

    def __call__(self) -> bool:
        self.calls.put(time.monotonic())
        return False

    def wait(self) -> float:
        return self.calls.get(timeout=patience(20))


def test_each_notification_calls_work_once(notifier: RedisNotifier, listening: Listening) -> None:
    calls = Calls()
    listening(notifier.listen, calls)
    notifier.notify([uuid7(), uuid7()])
    calls.wait()
    calls.wait()
    time.sleep(0.3)
    assert calls.calls.empty()


def test_an_idle_worker_is_notified_within_half_a_second(notifier: RedisNotifier, listening: Listening) -> None:
    calls = Calls()
    listening(notifier.listen, calls)
    notifier.notify([uuid7()])
    calls.wait()
    sent = time.monotonic()
    notifier.notify([uuid7()])
    assert calls.wait() - sent < 0.5


def test_a_job_named_twice_is_one_message(notifier: RedisNotifier, redis_server: RedisServer) -> None:
    job_id = uuid7()
    notifier.notify([job_id, job_id])
    with redis_server.client() as client:
        assert client.lrange("rq:queue:emender", 0, -1) == [str(job_id).encode()]


def test_needs_notification_only_while_the_queue_is_empty(notifier: RedisNotifier) -> None:
    assert notifier.needs_notification()
    notifier.notify([uuid7()])
    assert not notifier.needs_notification()


def test_the_message_is_an_id_and_names_no_code(notifier: RedisNotifier, redis_server: RedisServer) -> None:
    job_id = uuid7()
    notifier.notify([job_id])
    with redis_server.client() as client:
        message = client.hgetall(f"rq:job:{job_id}")
    assert json.loads(zlib.decompress(message[b"data"])) == ["emender.none", None, [], {}]
    assert message[b"description"] == b"emender.none()"


def test_the_message_is_gone_before_the_work_begins(
    notifier: RedisNotifier, redis_server: RedisServer, listening: Listening
) -> None:
    job_id = uuid7()
    found: queue.Queue[list[bytes]] = queue.Queue()

    def work() -> bool:
        with redis_server.client() as client:
            found.put(client.keys(f"*{job_id}*") + client.lrange("rq:queue:emender", 0, -1))
        return True

    listening(notifier.listen, work)
    notifier.notify([job_id])
    assert found.get(timeout=patience(20)) == []


def test_a_foreign_message_calls_work_and_runs_nothing(
    notifier: RedisNotifier, redis_server: RedisServer, listening: Listening
) -> None:
    calls = Calls()
    listening(notifier.listen, calls)
    with redis_server.client() as client:
        Queue("emender", connection=client, serializer=JSONSerializer).enqueue("os.getcwd", job_id="not-a-uuid")
        calls.wait()
        assert client.keys("rq:job:*") == []


def test_listening_survives_a_flush(notifier: RedisNotifier, redis_server: RedisServer, listening: Listening) -> None:
    calls = Calls()
    listening(notifier.listen, calls)
    with redis_server.client() as client:
        client.flushall()
    notifier.notify([uuid7()])
    calls.wait()


def test_polls_while_redis_is_away_and_comes_back(
    notifier: RedisNotifier, redis_server: RedisServer, listening: Listening
) -> None:
    calls = Calls()
    listening(notifier.listen, calls)
    notifier.notify([uuid7()])
    calls.wait()
    redis_server.kill()
    calls.wait()
    with pytest.raises(NotifierUnavailable, match="Redis does not answer"):
        notifier.notify([uuid7()])
    with pytest.raises(NotifierUnavailable, match="Redis does not answer"):
        notifier.needs_notification()
    redis_server.start()
    notifier.notify([uuid7()])
    deadline = time.monotonic() + patience(20)
    while not notifier.needs_notification():  # polling takes no message out of Redis
        assert time.monotonic() < deadline, "it did not come back to Redis"
        time.sleep(0.05)


def test_polls_where_there_never_was_a_redis(listening: Listening) -> None:
    calls = Calls()
    listening(RedisNotifier(f"redis://127.0.0.1:{free_port()}/0", poll_seconds=0.1).listen, calls)
    calls.wait()


def test_stops_within_seconds(notifier: RedisNotifier) -> None:
    stopping = threading.Event()
    thread = threading.Thread(target=notifier.listen, args=(lambda: False,), kwargs={"stopping": stopping})
    thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    stopping.set()
    thread.join(timeout=patience(10))
    assert not thread.is_alive() and time.monotonic() - began < patience(5)
