"""The bell over Redis, by RQ: a queue of job ids, and a worker that takes them off it.

RQ is not trusted with the work itself. Its message names no code that would be run and is gone from Redis before the
work begins, so that none of RQ's own recovery, retries or time-outs has a say in what happens to a job.
"""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID, uuid4

import structlog
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, SimpleWorker
from rq.exceptions import DequeueTimeout
from rq.job import Job as Message
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

from app.jobs.notifier import BellBroken, Work
from app.jobs.polling_notifier import PollingBell

log = structlog.get_logger()

QUEUE = "emender"
NOTHING = "emender.none"  # RQ wants a function's name; ours is never looked up
RECONNECT_SECONDS = 3.0
WORKER_SECONDS = 15  # after which RQ takes a silent listener for gone; its socket times out a little earlier


def ping(url: str) -> str | None:
    """None where Redis answers; else what is wrong, without the URL."""
    try:
        with Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_connect_timeout=2.0, socket_timeout=2.0) as redis:
            redis.ping()
    except (RedisError, ValueError) as error:
        return type(error).__name__
    return None


class RedisBell:
    """Rings through a Redis list. While Redis is away its listeners poll the ledger."""

    def __init__(self, url: str, *, poll_seconds: float, worker: str = "") -> None:
        self.poll_seconds = poll_seconds
        self.worker = worker
        # Fail fast: whoever rings or listens has something better to do than to wait for Redis.
        self._redis = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 1),
            socket_connect_timeout=2.0,
            socket_keepalive=True,
        )
        self._queue = Queue(QUEUE, connection=self._redis, serializer=JSONSerializer)

    def ring(self, job_ids: Sequence[UUID]) -> None:
        """Announce these jobs; one that is already announced is not announced again. Raises `BellBroken`."""
        try:
            announced = set(self._queue.get_job_ids())
            fresh = [str(job_id) for job_id in dict.fromkeys(job_ids) if str(job_id) not in announced]
            messages = [Queue.prepare_data(NOTHING, job_id=job_id) for job_id in fresh]
            if messages:
                self._queue.enqueue_many(messages)
        except RedisError as error:
            raise BellBroken(f"Redis does not answer: {type(error).__name__}") from error

    def listen(self, work: Work, *, stopping: threading.Event) -> None:
        """Call `work` at each ring until `stopping` is set; polls the ledger while Redis is away."""
        polling = PollingBell(seconds=self.poll_seconds)
        away = False
        while not stopping.is_set():
            try:
                listener = self._listener()
                if away:
                    log.info("Redis is back")
                away = False
                listener.listen(work, stopping=stopping)
            except RedisError as error:
                if not away:
                    log.warning("Redis does not answer; polling meanwhile", error=type(error).__name__)
                away = True
                polling.listen(work, stopping=stopping, until=time.monotonic() + RECONNECT_SECONDS)

    def _listener(self) -> "Listener":
        # Each has a name of its own: after an outage Redis may still hold the one that could not sign off.
        name = f"{self.worker or 'worker'}-{uuid4().hex[:8]}"
        return Listener(
            [self._queue], name=name, connection=self._redis, serializer=JSONSerializer, worker_ttl=WORKER_SECONDS
        )


class Listener(SimpleWorker):
    """An RQ worker that never forks, takes no commands over Redis, and reads of a message nothing but its id."""

    death_penalty_class = TimerDeathPenalty  # takes no signal handlers

    def listen(self, work: Work, *, stopping: threading.Event) -> None:
        """RQ's loop as we need it: leaves on the first error of Redis, and within a second of `stopping`."""
        self.bootstrap(logging_level=logging.WARNING)
        try:
            while not stopping.is_set():
                self.heartbeat()
                if self.should_run_maintenance_tasks:
                    self.run_maintenance_tasks()
                with suppress(DequeueTimeout):
                    found = self.queue_class.dequeue_any(
                        self.queues, 1, connection=self.connection, serializer=self.serializer
                    )
                    if found is not None:
                        self.take(*found)
                        work(job_id(found[0]))
        finally:
            with suppress(RedisError):
                self.teardown()

    def take(self, message: Message, queue: Queue) -> None:
        """Take the message out of Redis; from here on the ledger alone knows of the job."""
        with self.connection.pipeline() as pipeline:
            pipeline.lrem(queue.intermediate_queue_key, 1, message.id)
            pipeline.delete(message.key)
            pipeline.execute()

    def subscribe(self) -> None:
        """No commands over Redis: a cancel is a flag in the ledger, a stop is a signal."""

    def unsubscribe(self) -> None:
        """There is no subscription to end."""


def job_id(message: Message) -> UUID | None:
    """The id that a message carries; None, which means any job, for one that is not ours."""
    try:
        return UUID(message.id)
    except ValueError:
        return None
