"""Renew a worker's leases while it computes, and read what the database says about them."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError

from app.db.engine import Sessions
from app.jobs import leases as job_leases
from app.jobs.leases import Lease
from app.observability.metrics import LEASES_LOST
from app.observability.outages import Outage
from emender.schemas.common import Progress

log = structlog.get_logger()


class Heartbeat:
    """Renews the held leases every `interval` seconds, in a thread and in sessions of its own.

    Each beat also writes the latest progress of each job and reads its cancel flag, so that a step of the work costs
    no query. While the database is away the leases last until they expire; each beat tries again.
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
        """Renew these leases until the block ends. Leases of jobs that have not ended by then expire."""
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
                self._held = {}

    @property
    def seconds(self) -> float:
        """Seconds since the current leases, or else the last ones, were claimed."""
        return time.monotonic() - self._began

    def report(self, lease: Lease, progress: Progress) -> None:
        """Keep the latest progress of the job; the next beat writes it."""
        with self._lock:
            self._progress[lease.job_id] = progress

    def forget(self, lease: Lease) -> None:
        """Stop renewing the lease: its job is ending."""
        with self._lock:
            self._held.pop(lease.job_id, None)

    def is_cancelled(self, lease: Lease) -> bool:
        """Whether a cancel was requested, as of the last beat."""
        return lease.job_id in self._cancelled

    def is_lost(self, lease: Lease) -> bool:
        """Whether another attempt may hold the job, as of the last beat."""
        return lease.job_id in self._lost

    def beat(self) -> None:
        """Renew the leases, write progress and read the cancel flags."""
        with self._lock:
            held = list(self._held.values())
            progress, self._progress = self._progress, {}
        if not held:
            return
        with self.sessions() as session:
            renewed = job_leases.renew(session, leases=held, lease_seconds=self.lease_seconds)
            for lease in held:
                if lease.job_id in renewed and lease.job_id in progress:
                    job_leases.write_progress(session, lease=lease, progress=progress[lease.job_id])
            session.commit()
        with self._lock:
            for lease in held:
                if lease.job_id not in self._held:
                    continue  # it ended during the beat
                if lease.job_id not in renewed:
                    self._lost.add(lease.job_id)
                    LEASES_LOST.inc()
                    del self._held[lease.job_id]
                    log.warning("lease lost", job=str(lease.job_id), attempt=lease.attempt)
                elif renewed[lease.job_id]:
                    self._cancelled.add(lease.job_id)

    def _run(self, ended: threading.Event) -> None:
        outage = Outage("leases not renewed: the database does not answer")
        while not ended.wait(self.interval):
            try:
                self.beat()
                outage.end()
            except DBAPIError as error:
                outage.begin(error=type(error).__name__)
