"""Real worker processes on a real database, to be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import Engine, select

from app.children import ends_with_parent
from app.db.engine import Sessions, sessions
from app.db.models import AuditEvent, Edit, Job, Model, Statistics
from app.models.captions import pack
from app.queueing.outbox import enqueue
from app.storage.local import LocalStore
from tests.pipelines import write_pipeline
from tests.servers import RedisServer, require_redis

Found = TypeVar("Found")

LEASE_SECONDS = 6.0
EVERY_STEP = {"objective": "text", "text_optimizer": "adam", "tolerance": 0}  # L-BFGS ends early
SLOW = EVERY_STEP | {"steps": 1500}  # several seconds on the tiny pipeline
QUICK = {"objective": "text", "steps": 3}


class WorkerProcess:
    """`python -m app.worker.main`, with short leases."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.worker.main"],
                env=environment,
                stdout=file,
                stderr=file,
                preexec_fn=ends_with_parent(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._process.wait()

    def stop(self, *, timeout: float = 60.0) -> int:
        """SIGTERM; returns the exit status."""
        self.send(signal.SIGTERM)
        return self._process.wait(timeout)

    def end(self) -> None:
        if self.status is None:
            self._process.kill()
            self._process.wait()

    def says(self, text: str) -> bool:
        return text in self.log.read_text()


class Ledger:
    """Puts work into a database, as the API does, and watches what becomes of it."""

    def __init__(self, factory: Sessions) -> None:
        self.factory = factory
        self.model_id: UUID | None = None

    def register(self) -> UUID:
        """Ask for the tiny pipeline to be registered; returns the job's id."""
        with self.factory() as session:
            model = Model(name="tiny", namespace="emender", source="tiny", created_by="test")
            session.add(model)
            session.flush()
            self.model_id = model.id
            job_id = enqueue(session, kind="register_model", target_id=model.id)
            session.commit()
        return job_id

    def add_edit(self, settings: dict[str, Any], source: str = "cat") -> UUID:
        """Ask for an edit; returns the id of its job."""
        destination = {"prompt": "dog"}
        edit = Edit(model_id=self.model_id, source=source, destination=destination, templates=["a {}", "{}"])
        edit.settings, edit.created_by = settings, "test"
        return self._ask(edit, kind="optimize_edit")

    def add_statistics(self, store: LocalStore, captions: Sequence[str]) -> UUID:
        """Ask for second moments over captions; returns the id of the job."""
        content, count = pack(captions, samples=len(captions))
        statistics = Statistics(model_id=self.model_id, captions_name="test", captions_sha256=store.put(content))
        statistics.captions, statistics.created_by = count, "test"
        return self._ask(statistics, kind="estimate_statistics")

    def _ask(self, target: Edit | Statistics, *, kind: str) -> UUID:
        with self.factory() as session:
            session.add(target)
            session.flush()
            job_id = enqueue(session, kind=kind, target_id=target.id)
            session.commit()
        return job_id

    def statistics(self, job_id: UUID) -> Statistics:
        with self.factory() as session:
            return session.get_one(Statistics, session.get_one(Job, job_id).target_id)

    def job(self, job_id: UUID) -> Job:
        with self.factory() as session:
            return session.get_one(Job, job_id)

    def edit(self, job_id: UUID) -> Edit:
        with self.factory() as session:
            edit = session.get_one(Edit, session.get_one(Job, job_id).target_id)
            assert edit.values is not None  # loaded while the session is open
            return edit

    def count(self, action: str) -> int:
        with self.factory() as session:
            return len(session.scalars(select(AuditEvent).where(AuditEvent.action == action)).all())

    def await_state(self, job_id: UUID, state: str, *, timeout: float = 240.0) -> Job:
        return wait(lambda: self.job(job_id), lambda job: job.state == state, timeout=timeout)

    def await_step(self, job_id: UUID, *, attempt: int = 1, timeout: float = 240.0) -> None:
        """Until this attempt is in the middle of its steps."""

        def working(job: Job) -> bool:
            return job.attempt == attempt and bool(job.progress and job.progress.get("step", 0) > 0)

        job = wait(lambda: self.job(job_id), working, timeout=timeout)
        assert job.progress is not None and job.progress["step"] < job.progress["steps"], "too late: it is done"


def wait(read: Callable[[], Found], condition: Callable[[Found], bool], *, timeout: float) -> Found:
    deadline = time.monotonic() + timeout
    while not condition(found := read()):
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain; last seen: {vars(found)}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots")
    write_pipeline(folder / "tiny")
    return folder


@pytest.fixture
def start_worker(database_url: str, roots: Path, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker process; further environment variables as keywords. All are ended after the test."""
    started: list[WorkerProcess] = []

    def start(**variables: str) -> WorkerProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
        environment |= {
            "EMENDER_DATABASE_URL": database_url,
            "EMENDER_FOLDER": str(tmp_path / "var"),
            "EMENDER_MODEL_ROOTS": str(roots),
            "EMENDER_LEASE_SECONDS": str(LEASE_SECONDS),
            "EMENDER_POLL_SECONDS": "0.2",
            "EMENDER_DEVICE": "cpu",
            "EMENDER_SIGNING_KEY_FILE": "none",
            "EMENDER_TORCH_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        } | variables
        started.append(WorkerProcess(environment, tmp_path / f"worker-{len(started)}.log"))
        return started[-1]

    yield start
    for worker in started:
        worker.end()


@pytest.fixture
def ledger(clean_database: Engine) -> Ledger:
    return Ledger(sessions(clean_database))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()
