import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import pytest

from app.jobs.notifier import BellBroken, Work
from tests.servers import RedisServer, require_redis


class RecordingBell:
    """Writes down what it was rung for; `broken`, it refuses as a bell without its Redis does."""

    def __init__(self) -> None:
        self.rung: list[UUID] = []
        self.broken = False

    def ring(self, job_ids: Sequence[UUID]) -> None:
        if self.broken:
            raise BellBroken("broken for the test")
        self.rung += job_ids

    def listen(self, work: Work, *, stopping: threading.Event) -> None:
        raise NotImplementedError


@pytest.fixture
def bell() -> RecordingBell:
    return RecordingBell()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def listening() -> Iterator[Callable[..., threading.Event]]:
    """Let a bell listen in a thread; ends it after the test."""
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
        thread.join(timeout=20)
        assert not thread.is_alive(), "the listener did not stop"
