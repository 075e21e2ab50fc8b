import threading
import time
from collections.abc import Callable
from uuid import UUID

from app.jobs.polling_notifier import PollingBell


def test_works_while_there_is_work_and_then_waits(listening: Callable[..., threading.Event]) -> None:
    asked: list[float] = []
    done = threading.Event()

    def work(job_id: UUID | None) -> bool:
        assert job_id is None
        asked.append(time.monotonic())
        if len(asked) == 5:
            done.set()
        return len(asked) < 4

    listening(PollingBell(seconds=0.3).listen, work)
    assert done.wait(10)
    pauses = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert max(pauses[:3]) < 0.25 and pauses[3] >= 0.3


def test_stops_at_once_while_it_waits() -> None:
    stopping = threading.Event()
    thread = threading.Thread(
        target=PollingBell(seconds=60).listen, args=(lambda _: False,), kwargs={"stopping": stopping}
    )
    thread.start()
    stopping.set()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_ends_at_its_hour() -> None:
    begun = time.monotonic()
    PollingBell(seconds=0.05).listen(lambda _: False, stopping=threading.Event(), until=begun + 0.2)
    assert 0.2 <= time.monotonic() - begun < 5
