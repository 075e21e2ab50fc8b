import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import Engine
from uuid_utils.compat import uuid7

from app.db.engine import Sessions, sessions
from app.jobs.enqueue import enqueue, enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT
from app.jobs.notifier import PollingNotifier, notify_after_commit
from tests.app.jobs.conftest import RecordingNotifier
from tests.patience import patience


class TestNotifyAfterCommit:
    @pytest.fixture
    def factory(self, clean_database: Engine, notifier: RecordingNotifier) -> Sessions:
        factory = sessions(clean_database)
        notify_after_commit(factory, notifier)
        return factory

    def test_notifies_of_committed_jobs_only(self, factory: Sessions, notifier: RecordingNotifier) -> None:
        with factory() as session:
            targets = [uuid7(), uuid7()]
            enqueue_many(session, kind=OPTIMIZE_EDIT, target_ids=targets, actor="test")
            session.rollback()
        with factory() as session:
            with session.begin_nested():
                job_ids = enqueue_many(session, kind=OPTIMIZE_EDIT, target_ids=targets, actor="test")
            assert not notifier.called.wait(0.2), "notified at the end of a savepoint"
            session.commit()
        assert notifier.called.wait(patience(10))
        assert notifier.notified == job_ids

    def test_continues_after_the_notifier_was_unavailable(self, factory: Sessions, notifier: RecordingNotifier) -> None:
        for notifier.unavailable in (True, False):
            with factory() as session:
                job_id = enqueue(session, kind=OPTIMIZE_EDIT, target_id=uuid7(), actor="test")
                session.commit()
            time.sleep(0.2)
        assert notifier.called.wait(patience(10))
        assert notifier.notified == [job_id]


class TestPolling:
    def test_works_while_there_is_work_and_then_waits(self, listening: Callable[..., threading.Event]) -> None:
        calls: list[float] = []
        done = threading.Event()

        def work() -> bool:
            calls.append(time.monotonic())
            if len(calls) == 5:
                done.set()
            return len(calls) < 4

        listening(PollingNotifier(seconds=0.3).listen, work)
        assert done.wait(patience(10))
        pauses = [later - earlier for earlier, later in zip(calls, calls[1:], strict=False)]
        assert max(pauses[:3]) < 0.25 and pauses[3] >= 0.3

    def test_stops_at_once_while_it_waits(self) -> None:
        stopping = threading.Event()
        thread = threading.Thread(
            target=PollingNotifier(seconds=60).listen, args=(lambda: False,), kwargs={"stopping": stopping}
        )
        thread.start()
        stopping.set()
        thread.join(timeout=patience(5))
        assert not thread.is_alive()

    def test_stops_at_the_given_time(self) -> None:
        began = time.monotonic()
        PollingNotifier(seconds=0.05).listen(lambda: False, stopping=threading.Event(), until=began + 0.2)
        assert 0.2 <= time.monotonic() - began < patience(5)

    def test_never_needs_notifications(self) -> None:
        assert not PollingNotifier(seconds=1).needs_notification()
