"""Claims, brothers and every way in which work can end; the work itself is a function of the test."""

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from uuid import UUID

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError, NoResultFound, OperationalError
from sqlalchemy.orm import Session

from app.db.engine import Sessions, connect, sessions
from app.db.models import Edit, Job, JsonObject, Model
from app.jobs import leases as ledger
from app.jobs import states
from app.jobs.enqueue import enqueue
from app.jobs.kinds import OPTIMIZE_EDIT, REGISTER_MODEL
from app.jobs.leases import Lease, LeaseLost
from app.jobs.states import CANCELLED
from app.settings import Settings
from app.storage.local import BlobCorrupt, LocalStore
from app.worker import runner as module
from app.worker.problems import INTERNAL
from app.worker.runner import JobContext, Runner
from app.worker.tasks import optimize_edits
from editing.errors import Cancelled, OptimisationDiverged

Work = Callable[[JobContext, Sequence[Lease]], None]
Read = Callable[[UUID], Job]
AddEdits = Callable[..., list[UUID]]


class Fake:
    """A job module whose work is given; its domain rows fail as edits do."""

    def __init__(self, work: Work) -> None:
        self.run = work

    def fail(self, session: Session, *, lease: Lease, problem: JsonObject) -> None:
        optimize_edits.fail(session, lease=lease, problem=problem)


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Let every job do this."""

    def replace(work: Work) -> None:
        monkeypatch.setattr(module, "job_module", lambda _: Fake(work))

    return replace


@pytest.fixture
def model(add_model: Callable[..., Model]) -> Model:
    return add_model()


def succeed(context: JobContext, leases: Sequence[Lease]) -> None:
    for lease in leases:
        with context.result(lease) as session:
            session.execute(update(Edit).where(Edit.id == lease.target_id).values(state="ready"))


class TestClaim:
    def test_nothing_to_do(self, runner: Runner) -> None:
        assert runner.work() is False

    def test_an_edit_and_its_brothers_at_once(
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

    def test_other_kinds_go_one_by_one(
        self, runner: Runner, model: Model, factory: Sessions, doing: Callable[[Work], None]
    ) -> None:
        sizes: list[int] = []
        doing(lambda _, leases: sizes.append(len(leases)))
        with factory() as session:
            for _ in range(2):
                enqueue(session, kind=REGISTER_MODEL, target_id=model.id, actor="test")
            session.commit()
        # The fake leaves the job undone and fails its target as an edit, which it is not.
        with pytest.raises(NoResultFound):
            runner.work()
        assert sizes == [1]

    def test_shows_the_edit_at_work(
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

    def test_a_payload_of_another_version_waits_for_those_who_know_it(
        self, runner: Runner, model: Model, add_edits: AddEdits, factory: Sessions, job: Read
    ) -> None:
        (job_id,) = add_edits(model, {})
        with factory() as session:
            session.execute(update(Job).values(payload_version=2))
            session.commit()
        assert runner.work() is False and job(job_id).state == "queued"

    def test_a_database_that_does_not_answer_is_no_end(self, settings: Settings, store: LocalStore) -> None:
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

    def test_succeeded(self, doing: Callable[[Work], None]) -> None:
        doing(succeed)
        assert self.end() == ("succeeded", "ready", None)

    def test_an_error_of_the_method_is_its_problem(self, doing: Callable[[Work], None]) -> None:
        def diverge(*_: object) -> None:
            raise OptimisationDiverged("the loss is not finite", pointer="/settings/learning_rate")

        doing(diverge)
        detail = "the loss is not finite"
        errors = [{"pointer": "/settings/learning_rate", "detail": detail}]
        problem = {"title": "Optimisation diverged", "detail": detail, "errors": errors}
        assert self.end() == ("failed", "failed", problem)

    def test_an_unexpected_error_says_nothing_of_the_machine(self, doing: Callable[[Work], None]) -> None:
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
    def test_storage(self, doing: Callable[[Work], None], error: Exception, title: str, says: str) -> None:
        def burst(*_: object) -> None:
            raise error

        doing(burst)
        job, edit, problem = self.end()
        assert (job, edit) == ("failed", "failed") and problem is not None
        assert problem["title"] == title and says in problem["detail"] and "/var/emender" not in problem["detail"]

    def test_a_database_that_went_away_leaves_the_job_to_its_lease(self, doing: Callable[[Work], None]) -> None:
        def away(*_: object) -> None:
            raise OperationalError("UPDATE jobs", {}, Exception("server closed the connection"))

        doing(away)
        assert self.end() == ("running", "optimizing", None)

    def test_a_statement_that_is_refused_is_no_outage(self, doing: Callable[[Work], None]) -> None:
        def refuse(*_: object) -> None:
            raise IntegrityError("INSERT INTO edit_values", {}, Exception("duplicate key"))

        doing(refuse)
        assert self.end() == ("failed", "failed", INTERNAL)

    def test_work_left_undone_has_failed(self, doing: Callable[[Work], None]) -> None:
        doing(lambda *_: None)
        assert self.end() == ("failed", "failed", INTERNAL)

    def ask_to_cancel(self) -> None:
        with self.factory() as session:
            session.execute(update(Job).values(cancel_requested=True))
            session.execute(update(Edit).values(state="cancelling"))
            session.commit()

    def test_cancelled_between_two_steps(self, doing: Callable[[Work], None]) -> None:
        def step(context: JobContext, leases: Sequence[Lease]) -> None:
            self.ask_to_cancel()
            deadline = time.monotonic() + 10
            while not context.cancelled(leases[0]) and time.monotonic() < deadline:
                time.sleep(0.02)
            raise Cancelled("as asked")

        doing(step)
        assert self.end() == ("cancelled", "cancelled", CANCELLED)

    def test_a_cancel_that_comes_before_the_result_wins(self, doing: Callable[[Work], None]) -> None:
        def finish_late(context: JobContext, leases: Sequence[Lease]) -> None:
            self.ask_to_cancel()
            succeed(context, leases)

        doing(finish_late)
        assert self.end() == ("cancelled", "cancelled", CANCELLED)

    def test_a_worker_that_is_stopped_gives_its_work_back(
        self, doing: Callable[[Work], None], stopping: threading.Event
    ) -> None:
        def step(context: JobContext, leases: Sequence[Lease]) -> None:
            stopping.set()
            if context.cancelled(leases[0]):
                raise Cancelled("stopping")

        doing(step)
        assert self.end() == ("queued", "queued", None)
        assert self.job(self.job_id).attempt == 0

    def test_a_result_of_a_lost_lease_is_refused(self, doing: Callable[[Work], None]) -> None:
        refused: list[str] = []

        def too_late(context: JobContext, leases: Sequence[Lease]) -> None:
            with self.factory() as session:  # the sweeper, and another worker
                ledger.requeue(session, lease=leases[0])
                states.set_queued(session, kind=OPTIMIZE_EDIT, target_ids=[leases[0].target_id])
                ledger.claim(session, worker="other", lease_seconds=60, candidates=select(Job.id))
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
        "from app.worker.runner import job_module\n"
        "for kind in KINDS: assert job_module(kind).run and job_module(kind).fail\n"
        "sys.exit(bool({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
