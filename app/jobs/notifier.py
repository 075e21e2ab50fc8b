"""What a bell is: a way to tell workers at once that there may be work. Postgres knows what the work is."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol
from uuid import UUID

Work = Callable[[UUID | None], bool]
"""Is told which job was announced, if any; claims and does the one whose turn it is. False where there was none."""


class BellBroken(Exception):
    """The bell cannot be rung now. Nothing is lost: the outbox keeps what was to be announced."""


class Bell(Protocol):
    """Rings and is listened to. A ring may be lost or come twice: what counts is the claim on Postgres."""

    def ring(self, job_ids: Sequence[UUID]) -> None:
        """Announce these jobs; one that is already announced is not announced again. Raises `BellBroken`."""

    def listen(self, work: Work, *, stopping: threading.Event) -> None:
        """Call `work` at each ring until `stopping` is set; survives whatever happens to the bell."""
