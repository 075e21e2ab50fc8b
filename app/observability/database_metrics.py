"""What Prometheus is told of the whole service, read from Postgres when it asks."""

import shutil
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

import editing
from app.db.engine import Sessions
from app.db.models import Job, Outbox, Webhook, WebhookDelivery
from app.jobs import workers
from app.jobs.kinds import KINDS

RECENT = timedelta(minutes=10)
PAUSE_SECONDS = 5.0
"""However often it is asked, the database is read once in so long."""
PATIENCE = timedelta(seconds=2)
"""A reading that takes longer is given up, as if the database were away."""


class LedgerMetrics:
    """The text of a scrape. A database that is away takes all of it but `emender_database_up`, which is 0."""

    def __init__(self, sessions: Sessions, *, folder: Path, pause: float = PAUSE_SECONDS) -> None:
        self.sessions, self.folder, self.pause = sessions, folder, pause
        self._lock = threading.Lock()
        self._text = b""
        self._read_at = -1e9  # monotonic seconds
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def text(self) -> bytes:
        """As Prometheus reads it. While one request waits for a database that hangs, the others are told the last."""
        if self._lock.acquire(blocking=False):
            try:
                if time.monotonic() - self._read_at >= self.pause:
                    self._text = generate_latest(self.registry)
                    self._read_at = time.monotonic()
            finally:
                self._lock.release()
        return self._text

    def describe(self) -> Iterator[Metric]:
        return iter(_families().values())

    def collect(self) -> Iterator[Metric]:
        families = _families()
        up = families.pop("emender_database_up")
        free, size = families.pop("emender_store_free_bytes"), families.pop("emender_store_size_bytes")
        disk = shutil.disk_usage(next(folder for folder in (self.folder, *self.folder.parents) if folder.exists()))
        free.add_metric([], disk.free)
        size.add_metric([], disk.total)
        yield from (free, size)
        try:
            with self.sessions() as session:
                session.execute(text(f"SET LOCAL statement_timeout = {PATIENCE // timedelta(milliseconds=1)}"))
                _read(session, families)
                session.rollback()
        except SQLAlchemyError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield from (up, *families.values())


def _families() -> dict[str, GaugeMetricFamily]:
    recent = f"within the last {RECENT // timedelta(minutes=1)} minutes"
    alive = f"within the last {workers.ALIVE // timedelta(seconds=1)} s"
    given: list[tuple[str, str, list[str]]] = [
        ("emender_database_up", "1: the database answered; 0: what is read from it is not told.", []),
        ("emender_jobs", "Jobs that wait or run.", ["kind", "state"]),
        ("emender_oldest_queued_job_seconds", "Age of the oldest job that waits; 0 where none does.", ["kind"]),
        ("emender_jobs_ended_recently", f"Jobs that ended {recent}.", ["kind", "state"]),
        (
            "emender_jobs_leases_lost",
            f"Leases that were lost by the jobs that wait, run, or ended {recent}; each was an attempt more.",
            ["kind"],
        ),
        ("emender_jobs_unannounced", "Jobs for which the bell was not rung yet.", []),
        ("emender_workers", f"Workers that were seen {alive}, by their version.", ["version"]),
        ("emender_webhooks", "Webhooks: `working`, `failing` since the last success, `disabled`.", ["state"]),
        ("emender_webhook_deliveries_pending", "Deliveries that are still to be sent, or tried again.", []),
        (
            "emender_webhook_delivery_overdue_seconds",
            "How long the delivery that is due for longest waits to be tried.",
            [],
        ),
        ("emender_webhook_deliveries_ended_recently", f"Deliveries that ended {recent}.", ["state"]),
        ("emender_store_free_bytes", "Free on the file system of the store's folder, where the API runs.", []),
        ("emender_store_size_bytes", "Size of that file system.", []),
    ]
    return {name: GaugeMetricFamily(name, meaning, labels=labels) for name, meaning, labels in given}


def _read(session: Session, families: dict[str, GaugeMetricFamily]) -> None:
    _read_jobs(session, families)
    families["emender_jobs_unannounced"].add_metric([], session.scalar(select(func.count()).select_from(Outbox)) or 0)
    seen = workers.alive(session)
    for version in sorted(seen.keys() | {editing.__version__}):
        families["emender_workers"].add_metric([version], seen.get(version, 0))
    _read_webhooks(session, families)


def _read_jobs(session: Session, families: dict[str, GaugeMetricFamily]) -> None:
    waiting = (
        select(
            Job.kind,
            Job.state,
            func.count().label("jobs"),
            func.extract("epoch", func.now() - func.min(Job.created_at)).label("age"),
            func.sum(Job.attempt).label("attempts"),
        )
        .where(Job.state.in_(("queued", "running")))
        .group_by(Job.kind, Job.state)
    )
    ended = (
        select(
            Job.kind,
            Job.state,
            func.count().label("jobs"),
            func.sum(func.greatest(Job.attempt - 1, 0)).label("lost"),
        )
        .where(Job.finished_at > func.now() - RECENT)
        .group_by(Job.kind, Job.state)
    )
    waits = {(row.kind, row.state): row for row in session.execute(waiting)}
    ends = {(row.kind, row.state): row for row in session.execute(ended)}
    for kind in KINDS:
        queued, running = waits.get((kind, "queued")), waits.get((kind, "running"))
        families["emender_jobs"].add_metric([kind, "queued"], queued.jobs if queued else 0)
        families["emender_jobs"].add_metric([kind, "running"], running.jobs if running else 0)
        families["emender_oldest_queued_job_seconds"].add_metric([kind], float(queued.age) if queued else 0)
        # A queued job's attempts were all lost; of the others the last was not.
        lost = (queued.attempts if queued else 0) + (running.attempts - running.jobs if running else 0)
        for state in ("succeeded", "failed", "cancelled"):
            row = ends.get((kind, state))
            families["emender_jobs_ended_recently"].add_metric([kind, state], row.jobs if row else 0)
            lost += row.lost if row else 0
        families["emender_jobs_leases_lost"].add_metric([kind], lost)


def _read_webhooks(session: Session, families: dict[str, GaugeMetricFamily]) -> None:
    failing = Webhook.failing_since.is_not(None)
    counts = session.execute(
        select(
            func.count().filter(Webhook.enabled, ~failing).label("working"),
            func.count().filter(Webhook.enabled, failing).label("failing"),
            func.count().filter(~Webhook.enabled).label("disabled"),
        )
    ).one()
    for state, count in counts._mapping.items():
        families["emender_webhooks"].add_metric([state], count)
    overdue = func.extract("epoch", func.now() - func.min(WebhookDelivery.due_at))
    pending = session.execute(
        select(func.count(), func.greatest(overdue, 0)).where(WebhookDelivery.state == "pending")
    ).one()
    families["emender_webhook_deliveries_pending"].add_metric([], pending[0])
    families["emender_webhook_delivery_overdue_seconds"].add_metric([], float(pending[1] or 0))
    ended = select(WebhookDelivery.state, func.count()).where(WebhookDelivery.ended_at > func.now() - RECENT)
    found = dict(session.execute(ended.group_by(WebhookDelivery.state)).all())
    for state in ("delivered", "failed"):
        families["emender_webhook_deliveries_ended_recently"].add_metric([state], found.get(state, 0))
