"""The Redis bell against a real redis-server: rung, listened to, flushed, killed."""

import json
import queue
import threading
import time
import zlib
from collections.abc import Callable
from uuid import UUID

import pytest
from rq import Queue
from rq.serializers import JSONSerializer
from uuid_utils.compat import uuid7

from app.jobs.notifier import BellBroken
from app.jobs.redis_notifier import RedisBell
from tests.servers import RedisServer, free_port

Listening = Callable[..., threading.Event]


@pytest.fixture
def bell(redis_server: RedisServer) -> RedisBell:
    return RedisBell(redis_server.url, poll_seconds=0.1)


class Heard:
    """Work that writes down what it was called for."""

    def __init__(self) -> None:
        self.calls: queue.Queue[UUID | None] = queue.Queue()

    def __call__(self, job_id: UUID | None) -> bool:
        self.calls.put(job_id)
        return False

    def next(self) -> UUID | None:
        return self.calls.get(timeout=20)


def test_listeners_hear_each_ring_once(bell: RedisBell, listening: Listening) -> None:
    heard = Heard()
    listening(bell.listen, heard)
    first, second = uuid7(), uuid7()
    bell.ring([first, second])
    assert [heard.next(), heard.next()] == [first, second]
    time.sleep(0.3)
    assert heard.calls.empty()


def test_what_is_announced_is_not_announced_again(bell: RedisBell, redis_server: RedisServer) -> None:
    job_id = uuid7()
    bell.ring([job_id, job_id])
    bell.ring([job_id])
    with redis_server.client() as client:
        assert client.lrange("rq:queue:emender", 0, -1) == [str(job_id).encode()]


def test_the_message_is_an_id_and_nothing_else(bell: RedisBell, redis_server: RedisServer) -> None:
    """Nothing in Redis names code to run, or is a pickle."""
    job_id = uuid7()
    bell.ring([job_id])
    with redis_server.client() as client:
        message = client.hgetall(f"rq:job:{job_id}")
    assert json.loads(zlib.decompress(message[b"data"])) == ["emender.none", None, [], {}]
    assert message[b"description"] == b"emender.none()"


def test_the_message_is_gone_before_the_work_begins(
    bell: RedisBell, redis_server: RedisServer, listening: Listening
) -> None:
    found: queue.Queue[list[bytes]] = queue.Queue()

    def work(job_id: UUID | None) -> bool:
        with redis_server.client() as client:
            found.put(client.keys(f"*{job_id}*") + client.lrange("rq:queue:emender:intermediate", 0, -1))
        return True

    listening(bell.listen, work)
    bell.ring([uuid7()])
    assert found.get(timeout=20) == []


def test_a_message_that_is_not_ours_means_any_job(
    bell: RedisBell, redis_server: RedisServer, listening: Listening
) -> None:
    heard = Heard()
    listening(bell.listen, heard)
    with redis_server.client() as client:
        Queue("emender", connection=client, serializer=JSONSerializer).enqueue("os.getcwd", job_id="not-a-uuid")
        assert heard.next() is None


def test_a_flush_is_survived(bell: RedisBell, redis_server: RedisServer, listening: Listening) -> None:
    heard = Heard()
    listening(bell.listen, heard)
    with redis_server.client() as client:
        client.flushall()
    job_id = uuid7()
    bell.ring([job_id])
    assert heard.next() == job_id


def test_polls_while_redis_is_away_and_comes_back(
    bell: RedisBell, redis_server: RedisServer, listening: Listening
) -> None:
    heard = Heard()
    listening(bell.listen, heard)
    bell.ring([first := uuid7()])
    assert heard.next() == first
    redis_server.kill()
    assert heard.next() is None, "it did not poll"
    with pytest.raises(BellBroken, match="Redis does not answer"):
        bell.ring([uuid7()])
    redis_server.start()
    bell.ring([second := uuid7()])
    deadline = time.monotonic() + 20
    while (call := heard.next()) != second:
        assert call is None and time.monotonic() < deadline


def test_a_name_that_redis_still_holds_is_no_obstacle(redis_server: RedisServer, listening: Listening) -> None:
    """As after an outage, when the listener could not sign off and comes back."""
    heard = Heard()
    for _ in range(2):
        bell = RedisBell(redis_server.url, poll_seconds=0.1, worker="one-name")
        listening(bell.listen, heard)
    job_ids = [uuid7() for _ in range(4)]
    bell.ring(job_ids)
    assert {heard.next() for _ in job_ids} == set(job_ids)
    time.sleep(1)
    with redis_server.client() as client:
        assert client.scard("rq:workers") == 2


def test_polls_when_there_never_was_a_redis(listening: Listening) -> None:
    heard = Heard()
    listening(RedisBell(f"redis://127.0.0.1:{free_port()}/0", poll_seconds=0.1).listen, heard)
    assert heard.next() is None


def test_stops_within_seconds(bell: RedisBell) -> None:
    stopping = threading.Event()
    thread = threading.Thread(target=bell.listen, args=(lambda _: False,), kwargs={"stopping": stopping})
    thread.start()
    time.sleep(0.5)
    begun = time.monotonic()
    stopping.set()
    thread.join(timeout=10)
    assert not thread.is_alive() and time.monotonic() - begun < 5
