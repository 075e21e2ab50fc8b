"""One piece of work from claim to fenced write, whatever its kind and whatever bell announced it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast
from uuid import UUID

import structlog
from sqlalchemy import Select, select
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.orm import Session

from app.db.engine import Sessions
from app.db.models import Edit, Job, JsonObject
from app.jobs import leases as ledger
from app.jobs import states
from app.jobs.kinds import KINDS
from app.jobs.leases import Lease, LeaseLost
from app.jobs.states import CANCELLED
from app.observability.metrics import JOB_SECONDS
from app.settings import Settings
from app.storage.store import Store
from app.worker.heartbeat import Heartbeat
from app.worker.pipelines import WarmPipeline
from app.worker.problems import INTERNAL, problem_of
from editing.errors import Cancelled, EditingError
from emender.schemas.common import Progress

if TYPE_CHECKING:
    from editing.evaluation.classifiers import Classifier
    from editing.pipelines import EditablePipeline

log = structlog.get_logger()

PAYLOAD_VERSION = 1
"""Jobs of another version stay queued for the workers that know it."""

AWAY = (OperationalError, InterfaceError, InternalError)
"""How a database says that it does not answer, or no more, or that it ended a transaction that stood still; a retry may
find it again."""


class JobModule(Protocol):
    """What a module of one kind of work offers. Importing it loads no torch: `editing.<name>` does on first use."""

    def run(self, context: "JobContext", leases: Sequence[Lease]) -> None:
        """Do the work of these leases, all of one kind.

        Each result is written in one transaction, `with context.result(lease) as session:`. A lease that is left
        unfinished is settled by the runner: failed with the problem of the exception raised, cancelled where that was
        asked for, given back where the worker is stopping.
        """

    def fail(self, session: Session, *, lease: Lease, problem: JsonObject) -> None:
        """Put the domain row into its failed state, or its cancelled one where `problem` is `CANCELLED`; with audit.

        Called in the transaction that ends the job, by the runner and by the sweeper.
        """


@dataclass(frozen=True)
class JobContext:
    """What the work of a job may use."""

    settings: Settings
    sessions: Sessions
    store: Store
    heartbeat: Heartbeat
    stopping: threading.Event
    pipelines: WarmPipeline

    def report(self, lease: Lease, stage: str, done: int = 0, total: int = 1, **figures: float | None) -> None:
        """Report the progress of the job. Call it at any rate: each heartbeat writes the latest."""
        self.heartbeat.report(lease, Progress(stage=stage, done=done, total=total, **figures))

    def cancelled(self, lease: Lease) -> bool:
        """Whether to stop this job's work now: a cancel was asked for, the lease was lost, or the worker is stopping.

        Ask at each step, costs nothing. Then return, or raise `editing.errors.Cancelled`; the runner finds out which
        of the three it was.
        """
        return self.stopping.is_set() or self.heartbeat.cancelled(lease) or self.heartbeat.lost(lease)

    @contextmanager
    def result(self, lease: Lease) -> Iterator[Session]:
        """The transaction that writes the job's result and ends it as succeeded.

        Raises `LeaseLost` where another attempt may write it, and `Cancelled` where a cancel came in before; once
        inside, none can.
        """
        with self.sessions() as session:
            if ledger.hold(session, lease=lease):
                raise Cancelled("a cancel came in before the result was written")
            self.heartbeat.forget(lease)  # from here on the row is locked, and then ended
            yield session
            ledger.finish(session, lease=lease, state="succeeded")
            session.commit()
        self.ended(lease, "succeeded")

    def fail(self, lease: Lease, problem: JsonObject) -> None:
        """End one of several jobs as failed, and go on with the others. Raises `LeaseLost`, and `Cancelled`."""
        with self.sessions() as session:
            if ledger.hold(session, lease=lease):
                raise Cancelled("a cancel came in before the failure was written")
            self.heartbeat.forget(lease)
            fail(session, lease=lease, problem=problem)
            session.commit()
        self.ended(lease, "failed")

    def ended(self, lease: Lease, outcome: str) -> None:
        """Count and log the end of a job, as this worker brought it about."""
        seconds = self.heartbeat.seconds
        JOB_SECONDS.labels(lease.kind, outcome).observe(seconds)
        names = {"job": str(lease.job_id), "target": str(lease.target_id), "kind": lease.kind}
        log.info("job ended", **names, outcome=outcome, seconds=round(seconds, 3))

    def pipeline(self, model_id: UUID) -> "EditablePipeline":
        """The model's pipeline, kept warm until another model is asked for. Leave its weights as they are."""
        with self.sessions() as session:
            return self.pipelines.get(session, model_id=model_id)

    def classifier(self, model_id: UUID) -> "Classifier | None":
        """What judges the model's pictures; None where nothing does. Raises `ClassifierUnusable`."""
        with self.sessions() as session:
            return self.pipelines.classifier(session, model_id=model_id)


def job_module(kind: str) -> JobModule:
    """The module that does the work of this kind."""
    return cast(JobModule, import_module(KINDS[kind].task))


def fail(session: Session, *, lease: Lease, problem: JsonObject) -> None:
    """End a job and its domain row as failed, or as cancelled where `problem` is `CANCELLED`."""
    state = "cancelled" if problem == CANCELLED else "failed"
    ledger.finish(session, lease=lease, state=state, problem=problem)
    job_module(lease.kind).fail(session, lease=lease, problem=problem)


class Runner:
    """Claims work and sees it through: results, failures, cancels and stops all pass the fence.

    `stopping` asks the work under way to end at its next step; what is unfinished goes back to the queue.
    """

    def __init__(
        self, *, settings: Settings, sessions: Sessions, store: Store, worker: str, stopping: threading.Event
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.worker = worker
        self.heartbeat = Heartbeat(
            sessions, lease_seconds=settings.lease_seconds, interval=settings.poll_interval_seconds
        )
        pipelines = WarmPipeline(
            store,
            folder=settings.data_dir,
            model_roots=settings.model_roots,
            device=settings.device,
            threads=settings.torch_threads,
        )
        self.context = JobContext(settings, sessions, store, self.heartbeat, stopping, pipelines)

    def work(self) -> bool:
        """Claim the job whose turn it is with its brothers, and do it. False where there was none to claim."""
        try:
            leases = self._claim()
        except DBAPIError as error:
            log.warning("nothing claimed: the database does not answer", error=type(error).__name__)
            return False
        if not leases:
            return False
        jobs, targets = [str(lease.job_id) for lease in leases], [str(lease.target_id) for lease in leases]
        with structlog.contextvars.bound_contextvars(jobs=jobs, targets=targets):
            log.info("claimed", kind=leases[0].kind)
            self._do(leases)
        return True

    def _do(self, leases: Sequence[Lease]) -> None:
        problem = INTERNAL
        with self.heartbeat.holding(leases):
            try:
                job_module(leases[0].kind).run(self.context, leases)
            except (Cancelled, LeaseLost) as reason:
                log.info("work interrupted", reason=str(reason))
            except AWAY as error:
                # The result could not be written. The lease runs out, and another attempt is made.
                log.warning("result not written: the database does not answer", error=type(error).__name__)
                return
            except Exception as error:
                problem = problem_of(error)
                if not isinstance(error, EditingError):
                    log.exception("work failed", kind=leases[0].kind)
            for lease in leases:
                self._settle(lease, problem)

    def _claim(self) -> list[Lease]:
        known = Job.kind.in_(KINDS), Job.payload_version == PAYLOAD_VERSION
        candidates = select(Job.id).where(*known)
        with self.sessions() as session:
            leases = self._take(session, candidates, limit=1)
            if leases and KINDS[leases[0].kind].batches and self.settings.edit_batch_size > 1:
                model = select(Edit.model_id).where(Edit.id == leases[0].target_id).scalar_subquery()
                batch_candidates = select(Job.id).join(Edit, Edit.id == Job.target_id)
                batch_candidates = batch_candidates.where(*known, Job.kind == leases[0].kind, Edit.model_id == model)
                leases += self._take(session, batch_candidates, limit=self.settings.edit_batch_size - 1)
            if leases:
                target_ids = [lease.target_id for lease in leases]
                states.set_running(session, kind=KINDS[leases[0].kind], target_ids=target_ids)
            session.commit()
        return leases

    def _take(self, session: Session, candidates: Select[UUID], *, limit: int) -> list[Lease]:
        return ledger.claim(
            session,
            worker=self.worker,
            lease_seconds=self.settings.lease_seconds,
            candidates=candidates,
            limit=limit,
        )

    def _settle(self, lease: Lease, problem: JsonObject) -> None:
        """End what the work left unfinished; does nothing for a job that has ended or that is no longer ours."""
        try:
            with self.sessions() as session:
                outcome = "failed"
                if ledger.hold(session, lease=lease):
                    outcome = "cancelled"
                    fail(session, lease=lease, problem=CANCELLED)
                elif self.context.stopping.is_set() and problem == INTERNAL:
                    outcome = "released"
                    ledger.release(session, lease=lease)
                    states.set_queued(session, kind=KINDS[lease.kind], target_ids=[lease.target_id])
                else:
                    log.warning("job failed", job=str(lease.job_id), kind=lease.kind, problem=problem["detail"])
                    fail(session, lease=lease, problem=problem)
                session.commit()
            self.context.ended(lease, outcome)
        except LeaseLost:
            pass
        except AWAY as error:
            log.warning("job left to its lease: the database does not answer", error=type(error).__name__)
