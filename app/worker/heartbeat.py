"""Keeps a worker's leases alive while it computes, and brings back what the database has to say about them."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError

from app.db.engine import Sessions
from app.jobs import leases as ledger
from app.jobs.leases import Lease
from app.observability.metrics import LEASES_LOST
from emender.schemas.common import Progress

log = structlog.get_logger()


class Heartbeat:
    """Renews the held leases every `interval` seconds, in a thread and in sessions of its own.

    The same beat writes the latest progress of each job and reads its cancel flag, so that a step of the work costs no
    query, however short it is. A database that does not answer is asked again at the next beat: the leases hold until
    they run out.
    """

    def __init__(self, sessions: Sessions, *, lease_seconds: float, interval: float) -> None:
        self.sessions = sessions
        self.lease_seconds = lease_seconds
        self.interval = min(interval, lease_seconds / 3)
        self._held: dict[UUID, Lease] = {}
        self._progress: dict[UUID, Progress] = {}
        self._cancelled: set[UUID] = set()
        self._lost: set[UUID] = set()
        self._began = 0.0  # monotonic seconds
        self._lock = threading.Lock()

    @contextmanager
    def holding(self, leases: Sequence[Lease]) -> Iterator[None]:
        """Renew these leases until the block ends."""
        with self._lock:
            self._held = {lease.job_id: lease for lease in leases}
            self._progress, self._cancelled, self._lost = {}, set(), set()
            self._began = time.monotonic()
        ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(ended,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with self._lock:
                self._held = {}  # what is unfinished is nobody's now, and runs out

    @property
    def seconds(self) -> float:
        """Since the leases were taken that are held now, or were held last."""
        return time.monotonic() - self._began

    def report(self, lease: Lease, progress: Progress) -> None:
        """Remember the latest progress; the next beat writes it."""
        with self._lock:
            self._progress[lease.job_id] = progress

    def forget(self, lease: Lease) -> None:
        """The job has ended; there is nothing to renew."""
        with self._lock:
            self._held.pop(lease.job_id, None)

    def cancelled(self, lease: Lease) -> bool:
        """A cancel was asked for, as of the last beat."""
        return lease.job_id in self._cancelled

    def lost(self, lease: Lease) -> bool:
        """Another attempt may hold the job by now, as of the last beat."""
        return lease.job_id in self._lost

    def beat(self) -> None:
        """One round: renew, write progress, read the cancel flags."""
        with self._lock:
            held = list(self._held.values())
            progress, self._progress = self._progress, {}
        if not held:
            return
        with self.sessions() as session:
            renewed = ledger.renew(session, leases=held, lease_seconds=self.lease_seconds)
            for lease in held:
                if lease.job_id in renewed and lease.job_id in progress:
                    ledger.report(session, lease=lease, progress=progress[lease.job_id])
            session.commit()
        with self._lock:
            for lease in held:
                if lease.job_id not in self._held:
                    continue  # ended while we asked
                if lease.job_id not in renewed:
                    self._lost.add(lease.job_id)
                    LEASES_LOST.inc()
                    del self._held[lease.job_id]
                    log.warning("lease lost", job=str(lease.job_id), attempt=lease.attempt)
                elif renewed[lease.job_id]:
                    self._cancelled.add(lease.job_id)

    def _run(self, ended: threading.Event) -> None:
        away = False
        while not ended.wait(self.interval):
            try:
                self.beat()
                away = False
            except DBAPIError as error:
                if not away:
                    log.warning("leases not renewed: the database does not answer", error=type(error).__name__)
                away = True
