"""The bell where there is no Redis: workers look at the ledger."""

import threading
import time
from collections.abc import Sequence
from uuid import UUID

from app.jobs.notifier import Work


class PollingBell:
    """Nobody rings; an idle worker looks every `seconds` whether there is something to claim."""

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds

    def ring(self, job_ids: Sequence[UUID]) -> None:
        """Does nothing: the ledger itself is looked at."""

    def listen(self, work: Work, *, stopping: threading.Event, until: float | None = None) -> None:
        """Work as long as there is work, then wait; ends when `stopping` is set, or at `until` (monotonic seconds)."""
        while not stopping.is_set() and (until is None or time.monotonic() < until):
            if not work(None):
                stopping.wait(self.seconds)
