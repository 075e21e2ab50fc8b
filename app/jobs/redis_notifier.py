"""Job notifications through Redis, in an RQ queue of job ids.

RQ does not run the jobs. A message names no code and leaves Redis before the work begins, so RQ's own recovery, retries
and timeouts never apply.
"""

import threading
import time
from collections.abc import Sequence
from uuid import UUID

import structlog
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue
from rq.exceptions import DequeueTimeout
from rq.job import Job as Message
from rq.serializers import JSONSerializer

from app.jobs.notifier import JobNotifier, NotifierUnavailable, PollingNotifier, Work
from app.observability.outages import Outage
from app.settings import Settings

log = structlog.get_logger()

QUEUE = "emender"
NO_FUNCTION = "emender.none"  # RQ requires a function's name; this one is never looked up
RECONNECT_SECONDS = 3.0
TIMEOUT_SECONDS = 2.0


def ping(url: str) -> str | None:
    """Return None if Redis answers, else the kind of error, without the URL."""
    try:
        with _connect(url, retries=0) as redis:
            redis.ping()
    except (RedisError, ValueError) as error:
        return type(error).__name__
    return None


def open_notifier(settings: Settings) -> JobNotifier:
    """Return the notifier of the settings: Redis if it is set, else polling."""
    if settings.redis_url is None:
        return PollingNotifier(seconds=settings.poll_interval_seconds)
    return RedisNotifier(settings.redis_url.get_secret_value(), poll_seconds=settings.poll_interval_seconds)


class RedisNotifier:
    """Notifies through an RQ queue. While Redis is away, listeners poll the database."""

    def __init__(self, url: str, *, poll_seconds: float) -> None:
        self.poll_seconds = poll_seconds
        self._redis = _connect(url, retries=1)
        self._queue = Queue(QUEUE, connection=self._redis, serializer=JSONSerializer)

    def notify(self, job_ids: Sequence[UUID]) -> None:
        """Add a message for each job. Raises `NotifierUnavailable`."""
        try:
            ids = dict.fromkeys(map(str, job_ids))
            self._queue.enqueue_many([Queue.prepare_data(NO_FUNCTION, job_id=job_id) for job_id in ids])
        except RedisError as error:
            raise NotifierUnavailable(f"Redis does not answer: {type(error).__name__}") from error

    def needs_notification(self) -> bool:
        try:
            return self._queue.is_empty()
        except RedisError as error:
            raise NotifierUnavailable(f"Redis does not answer: {type(error).__name__}") from error

    def listen(self, work: Work, *, stopping: threading.Event) -> None:
        """Call `work` at each message until `stopping` is set. Polls the database while Redis is away."""
        polling = PollingNotifier(seconds=self.poll_seconds)
        outage = Outage("Redis does not answer; polling until it is back", ended="Redis is back")
        while not stopping.is_set():
            try:
                self._redis.ping()
                outage.end()
                while not stopping.is_set():
                    if self._take_message():
                        work()
            except RedisError as error:
                outage.begin(error=type(error).__name__)
                polling.listen(work, stopping=stopping, until=time.monotonic() + RECONNECT_SECONDS)

    def _take_message(self) -> bool:
        """Wait a second for a message and remove it from Redis. Returns False if there was none."""
        try:
            _, job_id = Queue.lpop([self._queue.key], 1, connection=self._redis)
        except DequeueTimeout:
            return False
        self._redis.delete(Message.key_for(job_id.decode()))
        return True


def _connect(url: str, *, retries: int) -> Redis:
    return Redis.from_url(
        url,
        retry=Retry(NoBackoff(), retries),
        socket_connect_timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS,
        socket_keepalive=True,
    )
