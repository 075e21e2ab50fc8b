"""Run jobs from the claim to the fenced write of their result."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.orm import Session

from app.db.engine import Sessions
from app.db.models import JsonObject
from app.jobs import leases, states
from app.jobs.kinds import JobKind
from app.jobs.leases import Lease, LeaseLost
from app.observability.metrics import JOB_SECONDS
from app.observability.outages import Outage
from app.settings import Settings
from app.storage.store import Store
from app.worker.claims import Claim, claim_work
from app.worker.heartbeat import Heartbeat
from app.worker.pipelines import WarmPipeline
from app.worker.problems import INTERNAL, problem_of
from editing.errors import Cancelled, EditingError
from emender.schemas.common import Progress

log = structlog.get_logger()

AWAY = (OperationalError, InterfaceError, InternalError)
"""The errors of a database that does not answer, or that ended a transaction without statements."""


class Task(Protocol):
    """The module of a job kind. Importing it loads no torch: `editing.<name>` does on first use."""

    def run(self, context: "JobContext", leases: Sequence[Lease]) -> None:
        """Do the work of these leases, all of one kind. There are several only if the kind is batched.

        Write each result in one transaction, `with context.result(lease) as session:`. The runner ends jobs that are
        left unfinished: failed with the problem of the exception raised, cancelled if that was requested, or back to
        the queue if the worker is stopping.
        """


@dataclass
class Ending:
    """The transaction that ends an attempt."""

    session: Session
    cancel_requested: bool
    outcome: str = "failed"
    """For logs and metrics."""


class JobContext:
    """What the code of a job may use."""

    def __init__(
        self, *, settings: Settings, sessions: Sessions, store: Store, heartbeat: Heartbeat, stopping: threading.Event
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.store = store
        self.heartbeat = heartbeat
        self.stopping = stopping
        self.pipelines = WarmPipeline(store, settings, sessions)
        self.unfinished: dict[UUID, Lease] = {}
        """Leases of the current run whose jobs have not ended."""

    def report(self, lease: Lease, stage: str, done: int = 0, total: int = 1, **losses: float | None) -> None:
        """Report the progress of the job, at any rate: each heartbeat writes the latest."""
        self.heartbeat.report(lease, Progress(stage=stage, done=done, total=total, **losses))

    def advance(self, lease: Lease, stage: str, done: int = 0, total: int = 1) -> None:
        """Report the progress of the job. Raises `Cancelled` if its work must stop."""
        self.report(lease, stage, done, total)
        if self.should_stop(lease):
            raise Cancelled(f"stopped at {stage} {done} of {total}")

    def should_stop(self, lease: Lease) -> bool:
        """Whether to stop this job's work: a cancel was requested, the lease was lost, or the worker is stopping.

        It costs nothing: call it at each step, then return or raise `Cancelled`. The runner finds out the reason.
        """
        return self.stopping.is_set() or self.heartbeat.is_cancelled(lease) or self.heartbeat.is_lost(lease)

    @contextmanager
    def ending(self, lease: Lease) -> Iterator[Ending]:
        """Open the transaction that ends this attempt, and commit it after the block.

        While the database is away it waits, so that an outage at the end of a long job costs no second attempt.
        Raises `LeaseLost` if another attempt may write the result.
        """
        with self.sessions() as session:
            ending = Ending(session, self._lock(session, lease))
            self.heartbeat.forget(lease)
            yield ending
            session.commit()
        del self.unfinished[lease.job_id]
        seconds = self.heartbeat.seconds
        JOB_SECONDS.labels(lease.kind.name, ending.outcome).observe(seconds)
        names = {"job": str(lease.job_id), "target": str(lease.target_id), "kind": lease.kind.name}
        log.info("job ended", **names, outcome=ending.outcome, seconds=round(seconds, 3))

    @contextmanager
    def result(self, lease: Lease) -> Iterator[Session]:
        """Open the transaction that writes the job's result; it then ends the job as succeeded.

        Raises `LeaseLost` if another attempt may write the result, and `Cancelled` if a cancel was requested. Within
        the block no cancel can come in.
        """
        with self.ending(lease) as ending:
            if ending.cancel_requested:
                raise Cancelled("a cancel was requested before the result was written")
            yield ending.session
            leases.finish(ending.session, lease=lease, state="succeeded")
            ending.outcome = "succeeded"

    def fail(self, lease: Lease, problem: JsonObject) -> None:
        """End one of several jobs as failed. Raises `LeaseLost`, and `Cancelled`."""
        with self.ending(lease) as ending:
            if ending.cancel_requested:
                raise Cancelled("a cancel was requested before the failure was written")
            states.fail(ending.session, lease=lease, problem=problem)

    def _lock(self, session: Session, lease: Lease) -> bool:
        outage = Outage("result waits: the database does not answer")
        while True:
            try:
                return leases.lock(session, lease=lease)
            except AWAY as error:
                outage.begin(error=type(error).__name__)
                session.rollback()
                if self.stopping.wait(self.settings.poll_interval_seconds):
                    raise


def task_of(kind: JobKind) -> Task:
    """Import the module of a job kind."""
    return cast(Task, import_module(kind.task))


class Runner:
    """Claims jobs with `claim` and runs them.

    Once `stopping` is set, the current work ends at its next step and unfinished jobs go back to the queue.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        sessions: Sessions,
        store: Store,
        worker: str,
        stopping: threading.Event,
        claim: Claim = claim_work,
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.worker = worker
        self.claim = claim
        self.heartbeat = Heartbeat(
            sessions, lease_seconds=settings.lease_seconds, interval=settings.poll_interval_seconds
        )
        self.context = JobContext(
            settings=settings, sessions=sessions, store=store, heartbeat=self.heartbeat, stopping=stopping
        )

    def work(self) -> bool:
        """Claim the next job, or a batch, and run it. Returns False if there was none to claim."""
        try:
            claimed = self._claim()
        except DBAPIError as error:
            log.warning("nothing claimed: the database does not answer", error=type(error).__name__)
            return False
        if not claimed:
            return False
        jobs, targets = [str(lease.job_id) for lease in claimed], [str(lease.target_id) for lease in claimed]
        with structlog.contextvars.bound_contextvars(jobs=jobs, targets=targets):
            log.info("claimed", kind=claimed[0].kind.name)
            self._run(claimed)
        return True

    def _run(self, claimed: Sequence[Lease]) -> None:
        problem = INTERNAL
        self.context.unfinished = {lease.job_id: lease for lease in claimed}
        with self.heartbeat.holding(claimed):
            try:
                task_of(claimed[0].kind).run(self.context, claimed)
            except (Cancelled, LeaseLost) as reason:
                log.info("work interrupted", reason=str(reason))
            except AWAY as error:
                # The leases expire, and another attempt is made.
                log.warning("work interrupted: the database does not answer", error=type(error).__name__)
                return
            except Exception as error:
                problem = problem_of(error)
                if not isinstance(error, EditingError):
                    log.exception("work failed", kind=claimed[0].kind.name)
            for lease in list(self.context.unfinished.values()):
                self._end_unfinished(lease, problem)

    def _claim(self) -> list[Lease]:
        with self.sessions() as session:
            claimed = self.claim(session, self.settings, self.worker)
            if claimed:
                target_ids = [lease.target_id for lease in claimed]
                states.set_running(session, kind=claimed[0].kind, target_ids=target_ids)
            session.commit()
        return claimed

    def _end_unfinished(self, lease: Lease, problem: JsonObject) -> None:
        """End a job that the work left unfinished, unless the lease was lost."""
        try:
            with self.context.ending(lease) as ending:
                if ending.cancel_requested:
                    ending.outcome = "cancelled"
                    states.cancel(ending.session, lease=lease)
                elif self.context.stopping.is_set() and problem == INTERNAL:
                    ending.outcome = "released"
                    leases.requeue(ending.session, lease=lease, counted=False)
                    states.set_queued(ending.session, kind=lease.kind, target_ids=[lease.target_id])
                else:
                    log.warning("job failed", job=str(lease.job_id), kind=lease.kind.name, problem=problem["detail"])
                    states.fail(ending.session, lease=lease, problem=problem)
        except LeaseLost:
            pass
        except AWAY as error:
            log.warning("job left to its lease: the database does not answer", error=type(error).__name__)
