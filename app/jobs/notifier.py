"""Notify idle workers of new jobs. A notification saves the wait for the next poll and guarantees nothing."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.orm import Session

from app.db.engine import Sessions

Work = Callable[[], bool]
"""Claim jobs and run them. Returns False if there was none to claim."""
ENQUEUED = "enqueued_jobs"
"""Key in `Session.info` of the ids of jobs that the transaction adds."""


class NotifierUnavailable(Exception):
    """The notification was not sent. The sweeper sends it again."""


class JobNotifier(Protocol):
    """Sends notifications, and listens to them in a worker. One may be lost or arrive twice."""

    def notify(self, job_ids: Sequence[UUID]) -> None:
        """Wake a worker for each of these jobs. Raises `NotifierUnavailable`."""

    def needs_notification(self) -> bool:
        """Whether no notification is queued, so that stale jobs need another. Raises `NotifierUnavailable`."""

    def listen(self, work: Work, *, stopping: threading.Event) -> None:
        """Call `work` at each notification until `stopping` is set."""


class PollingNotifier:
    """The notifier without Redis: workers poll the database every `seconds`."""

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds

    def notify(self, job_ids: Sequence[UUID]) -> None:
        """Do nothing."""

    def needs_notification(self) -> bool:
        return False

    def listen(self, work: Work, *, stopping: threading.Event, until: float | None = None) -> None:
        """Call `work` until there is none, then wait. Ends at `until` (monotonic seconds) or once `stopping` is set."""
        while not stopping.is_set() and (until is None or time.monotonic() < until):
            if not work():
                stopping.wait(self.seconds)


def notify_after_commit(sessions: Sessions, notifier: JobNotifier) -> None:
    """Notify workers of the jobs that these sessions enqueue, once they are committed.

    A thread sends the notifications, so that a slow Redis delays no request.
    """
    if isinstance(notifier, PollingNotifier):
        return
    committed: SimpleQueue[UUID] = SimpleQueue()

    def after_commit(session: Session) -> None:
        if not session.in_nested_transaction():
            for job_id in session.info.pop(ENQUEUED, ()):
                committed.put(job_id)

    def send() -> None:
        while True:
            job_ids = [committed.get()]
            with suppress(Empty):
                while True:
                    job_ids.append(committed.get_nowait())
            with suppress(NotifierUnavailable):
                notifier.notify(job_ids)

    event.listen(sessions, "after_commit", after_commit)
    threading.Thread(target=send, name="notifier", daemon=True).start()
