"""How jobs are claimed, batched and ended. The work itself is a function of the test."""

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from unittest.mock import patch
from uuid import UUID

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from app.db.engine import Sessions, connect, sessions
from app.db.models import Edit, Job, JsonObject, Model
from app.jobs import leases as job_leases
from app.jobs import states
from app.jobs.enqueue import enqueue
from app.jobs.kinds import OPTIMIZE_EDIT, REGISTER_MODEL
from app.jobs.leases import Lease, LeaseLost
from app.jobs.states import CANCELLED
from app.settings import Settings
from app.storage.local import LocalStore
from app.storage.store import BlobCorrupt
from app.worker import runner as module
from app.worker.problems import INTERNAL
from app.worker.runner import JobContext, Runner
from editing.errors import Cancelled, OptimizationDiverged
from tests.patience import patience

Work = Callable[[JobContext, Sequence[Lease]], None]
Read = Callable[[UUID], Job]
AddEdits = Callable[..., list[UUID]]


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Replace the work of every job."""

    def replace(work: Work) -> None:
        monkeypatch.setattr(module, "task_of", lambda _: SimpleNamespace(run=work))

    return replace


@pytest.fixture
def model(add_model: Callable[..., Model]) -> Model:
    return add_model()


def succeed(context: JobContext, leases: Sequence[Lease]) -> None:
    for lease in leases:
        with context.result(lease) as session:
            session.execute(update(Edit).where(Edit.id == lease.target_id).values(state="ready"))


class TestClaim:
    def test_an_empty_queue_gives_no_work(self, runner: Runner) -> None:
        assert runner.work() is False

    def test_edits_of_one_model_are_claimed_as_a_batch(
        self,
        runner: Runner,
        model: Model,
        add_model: Callable[..., Model],
        add_edits: AddEdits,
        doing: Callable[[Work], None],
    ) -> None:
        batches: list[list[UUID]] = []
        doing(lambda _, leases: batches.append([lease.job_id for lease in leases]))
        mine = add_edits(model, *[{}] * 20)
        other = add_edits(add_model("other"), {})
        while runner.work():
            pass
        assert batches == [mine[:16], mine[16:], other]

    def test_jobs_of_other_kinds_are_claimed_one_by_one(
        self, runner: Runner, model: Model, factory: Sessions, doing: Callable[[Work], None]
    ) -> None:
        sizes: list[int] = []
        doing(lambda _, leases: sizes.append(len(leases)))
        with factory() as session:
            for _ in range(2):
                enqueue(session, kind=REGISTER_MODEL, target_id=model.id, actor="test")
            session.commit()
        assert runner.work() and sizes == [1]

    def test_a_claimed_edit_is_optimizing(
        self, runner: Runner, model: Model, add_edits: AddEdits, factory: Sessions, doing: Callable[[Work], None]
    ) -> None:
        seen: list[str] = []

        def look(context: JobContext, leases: Sequence[Lease]) -> None:
            with factory() as session:
                seen.append(session.get_one(Edit, leases[0].target_id).state)
            succeed(context, leases)

        doing(look)
        add_edits(model, {})
        runner.work()
        assert seen == ["optimizing"]

    def test_a_payload_of_another_version_stays_queued(
        self, runner: Runner, model: Model, add_edits: AddEdits, factory: Sessions, job: Read
    ) -> None:
        (job_id,) = add_edits(model, {})
        with factory() as session:
            session.execute(update(Job).values(payload_version=2))
            session.commit()
        assert runner.work() is False and job(job_id).state == "queued"

    def test_an_unreachable_database_gives_no_work(self, settings: Settings, store: LocalStore) -> None:
        away = connect("postgresql://nobody@127.0.0.1:1/none")
        runner = Runner(settings=settings, sessions=sessions(away), store=store, worker="w", stopping=threading.Event())
        assert runner.work() is False
        away.dispose()


class TestEnds:
    @pytest.fixture(autouse=True)
    def prepare(
        self,
        runner: Runner,
        model: Model,
        add_edits: AddEdits,
        job: Read,
        edit: Callable[[UUID], Edit],
        factory: Sessions,
    ) -> None:
        self.runner, self.factory, self.job, self.edit = runner, factory, job, edit
        (self.job_id,) = add_edits(model, {})

    def end(self) -> tuple[str, str, JsonObject | None]:
        """Work; then the states of job and edit, and the problem that both have."""
        assert self.runner.work()
        job, edit = self.job(self.job_id), self.edit(self.job_id)
        assert job.problem == edit.problem
        return job.state, edit.state, job.problem

    def test_a_finished_job_has_succeeded(self, doing: Callable[[Work], None]) -> None:
        doing(succeed)
        assert self.end() == ("succeeded", "ready", None)

    def test_no_transaction_follows_a_job_that_succeeded(self, doing: Callable[[Work], None]) -> None:
        doing(succeed)
        with patch.object(job_leases, "lock", wraps=job_leases.lock) as locks:
            self.end()
        assert locks.call_count == 1

    def test_a_result_is_written_when_the_database_is_reachable_again(self, doing: Callable[[Work], None]) -> None:
        doing(succeed)
        away = OperationalError("SELECT", {}, Exception("server closed the connection"))
        with patch.object(job_leases, "lock", side_effect=[away, away, False]):
            assert self.end() == ("succeeded", "ready", None)
        assert self.job(self.job_id).attempt == 1

    def test_an_error_of_the_method_becomes_the_problem(self, doing: Callable[[Work], None]) -> None:
        def diverge(*_: object) -> None:
            raise OptimizationDiverged("the loss is not finite", pointer="/settings/learning_rate")

        doing(diverge)
        detail = "the loss is not finite"
        errors = [{"pointer": "/settings/learning_rate", "detail": detail}]
        problem = {"title": "Optimization diverged", "detail": detail, "errors": errors}
        assert self.end() == ("failed", "failed", problem)

    def test_an_unexpected_error_reveals_nothing_of_the_machine(self, doing: Callable[[Work], None]) -> None:
        def burst(*_: object) -> None:
            raise RuntimeError("secret of /root")

        doing(burst)
        assert self.end() == ("failed", "failed", INTERNAL)

    @pytest.mark.parametrize(
        ("error", "title", "says"),
        [
            (BlobCorrupt("ab" * 32), "Damaged store", "ab" * 32),
            (OSError(errno.ENOSPC, "No space left on device", "/var/emender/x"), "Storage failed", "No space left"),
        ],
    )
    def test_a_storage_error_becomes_the_problem(
        self, doing: Callable[[Work], None], error: Exception, title: str, says: str
    ) -> None:
        def burst(*_: object) -> None:
            raise error

        doing(burst)
        job, edit, problem = self.end()
        assert (job, edit) == ("failed", "failed") and problem is not None
        assert problem["title"] == title and says in problem["detail"] and "/var/emender" not in problem["detail"]

    def test_an_unreachable_database_leaves_the_job_to_its_lease(self, doing: Callable[[Work], None]) -> None:
        def away(*_: object) -> None:
            raise OperationalError("UPDATE jobs", {}, Exception("server closed the connection"))

        doing(away)
        assert self.end() == ("running", "optimizing", None)

    def test_a_rejected_statement_is_not_an_outage(self, doing: Callable[[Work], None]) -> None:
        def refuse(*_: object) -> None:
            raise IntegrityError("INSERT INTO edit_values", {}, Exception("duplicate key"))

        doing(refuse)
        assert self.end() == ("failed", "failed", INTERNAL)

    def test_a_job_left_unfinished_has_failed(self, doing: Callable[[Work], None]) -> None:
        doing(lambda *_: None)
        assert self.end() == ("failed", "failed", INTERNAL)

    def ask_to_cancel(self) -> None:
        with self.factory() as session:
            session.execute(update(Job).values(cancel_requested=True))
            session.execute(update(Edit).values(state="cancelling"))
            session.commit()

    def test_a_cancel_between_two_steps_cancels_the_job(self, doing: Callable[[Work], None]) -> None:
        def step(context: JobContext, leases: Sequence[Lease]) -> None:
            self.ask_to_cancel()
            deadline = time.monotonic() + patience(10)
            while not context.should_stop(leases[0]) and time.monotonic() < deadline:
                time.sleep(0.02)
            raise Cancelled("as asked")

        doing(step)
        assert self.end() == ("cancelled", "cancelled", CANCELLED)

    def test_a_cancel_before_the_result_is_written_wins(self, doing: Callable[[Work], None]) -> None:
        def finish_late(context: JobContext, leases: Sequence[Lease]) -> None:
            self.ask_to_cancel()
            succeed(context, leases)

        doing(finish_late)
        assert self.end() == ("cancelled", "cancelled", CANCELLED)

    def test_a_stopping_worker_returns_its_job_to_the_queue(
        self, doing: Callable[[Work], None], stopping: threading.Event
    ) -> None:
        def step(context: JobContext, leases: Sequence[Lease]) -> None:
            stopping.set()
            if context.should_stop(leases[0]):
                raise Cancelled("stopping")

        doing(step)
        assert self.end() == ("queued", "queued", None)
        assert self.job(self.job_id).attempt == 0

    def test_a_result_of_a_lost_lease_is_not_written(self, doing: Callable[[Work], None]) -> None:
        refused: list[str] = []

        def too_late(context: JobContext, leases: Sequence[Lease]) -> None:
            with self.factory() as session:  # the sweeper, and another worker
                job_leases.requeue(session, lease=leases[0])
                states.set_queued(session, kind=OPTIMIZE_EDIT, target_ids=[leases[0].target_id])
                job_leases.claim(session, worker="other", lease_seconds=60, candidates=select(Job.id))
                session.commit()
            try:
                succeed(context, leases)
            except LeaseLost as error:
                refused.append(str(error))
                raise

        doing(too_late)
        assert self.end() == ("running", "queued", None)
        assert refused == [f"job {self.job_id}, attempt 1"]
        assert self.job(self.job_id).worker == "other"


def test_the_worker_loads_no_torch_before_its_first_job() -> None:
    program = (
        "import sys, app.worker.main\n"
        "from app.jobs.kinds import KINDS\n"
        "from app.worker.runner import task_of\n"
        "for kind in KINDS.values(): assert task_of(kind).run\n"
        "sys.exit(bool({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
