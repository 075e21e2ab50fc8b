"""The Prometheus metrics of the whole service, read from Postgres."""

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy import Row, case, func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

import editing
from app.db.engine import Sessions
from app.db.models import Job, Webhook
from app.jobs import workers
from app.jobs.kinds import KINDS
from app.jobs.queries import is_in_queue
from app.observability.cached import CACHE_SECONDS, Cached

RECENT = timedelta(minutes=10)
TIMEOUT_MS = 2000
"""A statement that takes longer counts as an unavailable database."""

_RECENTLY = f"within the last {RECENT // timedelta(minutes=1)} minutes"
_ALIVE = f"within the last {workers.ALIVE // timedelta(seconds=1)} s"

FAMILIES: dict[str, tuple[str, list[str]]] = {
    "emender_database_up": ("1 if the database responds. If 0, the metrics read from it are missing.", []),
    "emender_store_free_bytes": ("Free space on the file system of the store's folder on the API's machine.", []),
    "emender_store_size_bytes": ("Size of that file system.", []),
    "emender_jobs": ("Queued and running jobs.", ["kind", "state"]),
    "emender_oldest_queued_job_seconds": ("Time that the oldest due job has waited; 0 if there is none.", ["kind"]),
    "emender_jobs_ended_recently": (f"Jobs that ended {_RECENTLY}.", ["kind", "state"]),
    "emender_jobs_leases_lost": (f"Leases lost by jobs that are queued, running, or ended {_RECENTLY}.", ["kind"]),
    "emender_workers": (f"Workers alive {_ALIVE}, by version.", ["version"]),
    "emender_webhooks": ("Webhooks: `working`, `failing` since the last success, `disabled`.", ["state"]),
}


class DatabaseMetrics:
    """A collector. If the database is unavailable, only `emender_database_up` (0) and the disk space remain."""

    def __init__(self, sessions: Sessions, *, folder: Path, seconds: float = CACHE_SECONDS) -> None:
        self.sessions, self.folder = sessions, folder
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.cached = Cached(lambda: generate_latest(self.registry), initial=b"", seconds=seconds)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format, at most some seconds old."""
        return self.cached.get()

    def describe(self) -> Iterator[Metric]:
        return iter(_Gauges().families.values())

    def collect(self) -> Iterator[Metric]:
        gauges = _Gauges()
        try:
            with self.sessions() as session:
                session.execute(text(f"SET LOCAL statement_timeout = {TIMEOUT_MS}"))
                _read_jobs(session, gauges)
                _read_workers(session, gauges)
                _read_webhooks(session, gauges)
                session.rollback()
            gauges.set("emender_database_up", 1)
        except SQLAlchemyError:
            gauges = _Gauges()  # drops what was read before the error
            gauges.set("emender_database_up", 0)
        disk = shutil.disk_usage(next(folder for folder in (self.folder, *self.folder.parents) if folder.exists()))
        gauges.set("emender_store_free_bytes", disk.free)
        gauges.set("emender_store_size_bytes", disk.total)
        return (family for family in gauges.families.values() if family.samples)


class _Gauges:
    def __init__(self) -> None:
        self.families = {
            name: GaugeMetricFamily(name, help_text, labels=labels) for name, (help_text, labels) in FAMILIES.items()
        }

    def set(self, name: str, value: float, *labels: str) -> None:
        self.families[name].add_metric(labels, float(value))


def _read_jobs(session: Session, gauges: _Gauges) -> None:
    # Every attempt but the last lost its lease; of a queued job, the last too. Deliveries are also retried.
    lost = func.greatest(Job.attempt - case((Job.state == "queued", 0), else_=1), 0)
    lost_leases = case((is_in_queue("work"), lost), else_=0)
    columns = (
        Job.kind,
        Job.state,
        func.count().label("jobs"),
        func.greatest(func.extract("epoch", func.now() - func.min(Job.due_at)), 0).label("waited"),
        func.sum(lost_leases).label("lost"),
    )
    rows: dict[tuple[str, str], Row[Any]] = {}
    for jobs in (Job.state.in_(("queued", "running")), Job.finished_at > func.now() - RECENT):
        query = select(*columns).where(jobs).group_by(Job.kind, Job.state)
        rows |= {(row.kind, row.state): row for row in session.execute(query)}
    for kind in KINDS:
        states = {state: row for (of_kind, state), row in rows.items() if of_kind == kind}
        for state in ("queued", "running"):
            gauges.set("emender_jobs", states[state].jobs if state in states else 0, kind, state)
        for state in ("succeeded", "failed", "cancelled"):
            gauges.set("emender_jobs_ended_recently", states[state].jobs if state in states else 0, kind, state)
        gauges.set("emender_oldest_queued_job_seconds", states["queued"].waited if "queued" in states else 0, kind)
        gauges.set("emender_jobs_leases_lost", sum(row.lost for row in states.values()), kind)


def _read_workers(session: Session, gauges: _Gauges) -> None:
    alive = workers.count_alive(session)
    for version in sorted(alive.keys() | {editing.__version__}):
        gauges.set("emender_workers", alive.get(version, 0), version)


def _read_webhooks(session: Session, gauges: _Gauges) -> None:
    failing = Webhook.failing_since.is_not(None)
    counts = session.execute(
        select(
            func.count().filter(Webhook.enabled, ~failing).label("working"),
            func.count().filter(Webhook.enabled, failing).label("failing"),
            func.count().filter(~Webhook.enabled).label("disabled"),
        )
    ).one()
    for state, count in counts._mapping.items():
        gauges.set("emender_webhooks", count, state)
