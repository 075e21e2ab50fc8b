import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import pytest

from app.jobs.notifier import NotifierUnavailable, Work
from tests.patience import patience
from tests.servers import RedisServer, require_redis


class RecordingNotifier:
    """Records the jobs it was called for. `unavailable`: refuses as a notifier without its Redis does."""

    def __init__(self) -> None:
        self.notified: list[UUID] = []
        self.called = threading.Event()
        self.unavailable = False
        self.pending = False

    def notify(self, job_ids: Sequence[UUID]) -> None:
        if self.unavailable:
            raise NotifierUnavailable("unavailable for the test")
        self.notified += job_ids
        self.called.set()

    def needs_notification(self) -> bool:
        return not self.pending

    def listen(self, work: Work, *, stopping: threading.Event) -> None:
        raise NotImplementedError


@pytest.fixture
def notifier() -> RecordingNotifier:
    return RecordingNotifier()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def listening() -> Iterator[Callable[..., threading.Event]]:
    """Run a notifier's `listen` in a thread, which ends after the test."""
    started: list[tuple[threading.Thread, threading.Event]] = []

    def listen(listen_to: Callable[..., None], work: Work) -> threading.Event:
        stopping = threading.Event()
        thread = threading.Thread(target=listen_to, args=(work,), kwargs={"stopping": stopping})
        thread.start()
        started.append((thread, stopping))
        return stopping

    yield listen
    for thread, stopping in started:
        stopping.set()
        thread.join(timeout=patience(20))
        assert not thread.is_alive(), "the listener did not stop"
