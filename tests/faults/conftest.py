"""Real processes on a real database, to be killed; and the list of what became of it."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, select

from app.db.engine import Sessions, connect, sessions
from app.db.migrate import upgrade
from app.db.models import AuditEvent, Checkpoint, Edit, Job, Model, Statistics
from app.jobs import workers
from app.jobs.enqueue import enqueue
from app.jobs.kinds import ESTIMATE_STATISTICS, OPTIMIZE_EDIT, REGISTER_MODEL, JobKind
from app.local.child_process import die_with_parent
from app.local.embedded_postgres import EmbeddedPostgres
from app.models.captions import pack_captions
from app.settings import Settings
from app.signing.keys import create_key, read_key
from app.storage.local import LocalStore
from app.worker.runner import Runner
from emender import pull
from tests.app.checkpoints.conftest import base_folder, ready_edit, register_folder
from tests.app.conftest import Headers, issue_keys
from tests.faults.outcomes import Outcome, Outcomes, pytest_addoption, pytest_configure, pytest_terminal_summary
from tests.patience import patience
from tests.pipelines import LAYERS, WIDTH, write_pipeline
from tests.postgres import initialize, server_folder
from tests.servers import ApiServer, RedisServer, environment, require_redis

__all__ = ["base_folder", "pytest_addoption", "pytest_configure", "pytest_terminal_summary"]

Found = TypeVar("Found")

LEASE_SECONDS = patience(6.0)
EVERY_STEP = {"objective": "text", "text_optimizer": "adam", "tolerance": 0}  # L-BFGS ends early
SLOW = EVERY_STEP | {"optimization_steps": 1500}  # several seconds on the tiny pipeline
QUICK = {"objective": "text", "optimization_steps": 3}


class WorkerProcess:
    """`python -m app.worker.main`, or another module that runs a worker."""

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        *,
        module: Sequence[str] = ("app.worker.main",),
        folder: Path | None = None,
    ) -> None:
        """`folder` is where the code lies; None: here."""
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env=environment,
                cwd=folder,
                stdout=file,
                stderr=file,
                preexec_fn=die_with_parent(),
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

    def await_start(self) -> None:
        """Until it claims jobs: importing torch takes seconds."""
        until(lambda: self.says("worker started") or self.status is not None, timeout=240)
        assert self.status is None, self.log.read_text()[-3000:]


class JobTable:
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
            job_id = enqueue(session, kind=REGISTER_MODEL, target_id=model.id, actor="test")
            session.commit()
        return job_id

    def add_edit(self, settings: dict[str, Any], source: str = "cat") -> UUID:
        """Ask for an edit; returns the id of its job."""
        destination = {"prompt": "dog"}
        edit = Edit(model_id=self.model_id, source=source, destination=destination, templates=["a {}", "{}"])
        edit.settings, edit.created_by = settings, "test"
        return self._ask(edit, kind=OPTIMIZE_EDIT)

    def add_statistics(self, store: LocalStore, captions: Sequence[str]) -> UUID:
        """Ask for second moments over captions; returns the id of the job."""
        content, count = pack_captions(captions, samples=len(captions))
        statistics = Statistics(model_id=self.model_id, captions_name="test", captions_sha256=store.put(content))
        statistics.captions, statistics.created_by = count, "test"
        return self._ask(statistics, kind=ESTIMATE_STATISTICS)

    def alive(self) -> int:
        """How many workers say that they are."""
        with self.factory() as session:
            return sum(workers.count_alive(session).values())

    def _ask(self, target: Edit | Statistics, *, kind: JobKind) -> UUID:
        with self.factory() as session:
            session.add(target)
            session.flush()
            job_id = enqueue(session, kind=kind, target_id=target.id, actor="test")
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
            _ = edit.value  # load it while the session is open
            return edit

    def count(self, action: str) -> int:
        with self.factory() as session:
            return len(session.scalars(select(AuditEvent).where(AuditEvent.action == action)).all())

    def latest_job(self, target_id: UUID) -> UUID:
        """The id of the target's latest job."""
        with self.factory() as session:
            query = select(Job.id).where(Job.target_id == target_id).order_by(Job.id.desc()).limit(1)
            return session.scalars(query).one()

    def build_job(self, version: str) -> Job:
        """That which builds the version."""
        with self.factory() as session:
            query = select(Job).join(Checkpoint, Checkpoint.id == Job.target_id)
            query = query.where(Job.kind == "build_checkpoint", Checkpoint.number == int(version[1:]))
            return session.scalars(query).one()

    def tally(self, edit_ids: Sequence[UUID]) -> dict[str, int]:
        """How many of the edits were lost, that is have not ended, and how many ended more than once."""
        with self.factory() as session:
            edits = session.scalars(select(Edit).where(Edit.id.in_(edit_ids))).all()
            ended = [edit for edit in edits if edit.state in ("ready", "failed", "cancelled")]
            endings = select(AuditEvent.target).where(AuditEvent.action.in_(("edit.ready", "edit.failed")))
            targets = list(session.scalars(endings))
            doubled = [
                edit
                for edit in edits
                if (edit.value is not None) != (edit.state == "ready") or targets.count(f"edit:{edit.id}") > 1
            ]
            return {"lost": len(edit_ids) - len(ended), "doubled": len(doubled)}

    def await_state(self, job_id: UUID, state: str, *, timeout: float = 240.0) -> Job:
        return wait(lambda: self.job(job_id), lambda job: job.state == state, timeout=timeout)

    def await_step(self, job_id: UUID, *, attempt: int = 1, timeout: float = 240.0) -> None:
        """Until this attempt is in the middle of its steps."""

        def working(job: Job) -> bool:
            return job.attempt == attempt and bool(job.progress and job.progress["done"] > 0)

        job = wait(lambda: self.job(job_id), working, timeout=timeout)
        assert job.progress is not None and job.progress["done"] < job.progress["total"], "too late: it is done"


def quick_settings(url: str, folder: Path, **given: Any) -> Settings:
    """With short leases, on the CPU."""
    quick: dict[str, Any] = {
        "lease_seconds": LEASE_SECONDS,
        "poll_interval_seconds": 0.2,
        "device": "cpu",
        "torch_threads": 1,
    }
    return Settings(database_url=SecretStr(url), data_dir=folder, **(quick | given))


class Site:
    """The service as processes: an API, workers as they are started, a signing key, a model that can be edited."""

    def __init__(self, url: str, folder: Path, base: Path, **given: Any) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.key_file = folder / "signing-key.pem"
        create_key(self.key_file)
        self.settings = quick_settings(url, folder / "var", signing_key_file=self.key_file, **given)
        self.engine = connect(url)
        self.sessions = sessions(self.engine)
        self.job_table = JobTable(self.sessions)
        self.store = LocalStore(self.settings.store_dir)
        with self.sessions() as session:
            self.keys: Mapping[str, Headers] = issue_keys(session)
            self.job_table.model_id = register_folder(session, self.store, base).id
        self.api = ApiServer(self.settings, log=folder / "api.log")
        self.workers: list[WorkerProcess] = []

    def start_worker(
        self, module: Sequence[str] = ("app.worker.main",), code: Path | None = None, **variables: str
    ) -> WorkerProcess:
        log = self.folder / f"worker-{len(self.workers)}.log"
        given = environment(self.settings, **variables)
        self.workers.append(WorkerProcess(given, log, module=module, folder=code))
        return self.workers[-1]

    def close(self) -> None:
        self.api.kill()
        for worker in self.workers:
            worker.end()
        self.engine.dispose()

    def ask(self, method: str, path: str, *, scope: str = "admin", **options: Any) -> httpx.Response:
        """A request on a connection of its own, with the key of a scope."""
        options["headers"] = {**self.keys[scope], **options.get("headers", {})}
        given: dict[str, Any] = {"timeout": 60, "trust_env": False, "verify": False, "follow_redirects": True}
        return httpx.request(method, self.api.url + path, **given, **options)  # verify: to read no certificates

    def post_edit(self, source: str, *, settings: Mapping[str, Any] = QUICK, **options: Any) -> httpx.Response:
        body = {"source": source, "destination": {"prompt": "dog"}, "templates": ["a {}"], "settings": settings}
        return self.ask("POST", "/v1/models/tiny/edits", json=body, **options)

    def ready_edit(self, source: str) -> str:
        """An edit with a value, as a worker would have left it; its id."""
        with self.sessions() as session:
            model = session.get_one(Model, self.job_table.model_id)
            return str(ready_edit(session, model, source, width=WIDTH, layer=LAYERS - 2).id)

    def apply(self, **body: Any) -> str:
        """Ask for a version; its name."""
        answer = self.ask("POST", "/v1/models/tiny/apply", json=body)
        assert answer.status_code == 202, answer.text
        return answer.json()["version"]  # type: ignore[no-any-return]

    def version(self, version: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/v1/models/tiny/checkpoints/{version}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def await_version(self, version: str, *, timeout: float = 240.0) -> dict[str, Any]:
        """The version once it is published, or has failed."""
        until(lambda: self.version(version)["state"] != "building", timeout=timeout)
        return self.version(version)

    def publish(self, **body: Any) -> dict[str, Any]:
        """A version that a worker of our own process builds, which is soon ready to."""
        version = self.apply(**body)
        runner = Runner(
            settings=self.settings, sessions=self.sessions, store=self.store, worker="test", stopping=threading.Event()
        )
        assert runner.work()
        made = self.version(version)
        assert made["state"] == "published", made["problem"]
        return made

    def alias(self, name: str = "production") -> str | None:
        """The version that it points at."""
        answer = self.ask("GET", f"/v1/models/tiny/aliases/{name}")
        return answer.json()["version"] if answer.status_code == 200 else None

    def move_alias(self, version: str, *, etag: str = "*", name: str = "production") -> httpx.Response:
        return self.ask("PUT", f"/v1/models/tiny/aliases/{name}", json={"version": version}, headers={"If-Match": etag})

    def problem(self, revision: str) -> str:
        """Verify all files of a revision as the Hub protocol serves them. Return the error, or an empty string."""
        listed = self.ask("GET", f"/api/models/emender/tiny/revision/{revision}")
        assert listed.status_code == 200, listed.text
        folder = self.folder / "pulled" / revision
        for file in listed.json()["siblings"]:
            answer = self.ask("GET", f"/emender/tiny/resolve/{revision}/{file['rfilename']}")
            assert answer.status_code == 200, answer.text
            path = folder / file["rfilename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(answer.content)
        public = self.folder / "public.pem"
        public.write_text(read_key(self.key_file).public_pem)
        try:
            pull.verify(folder, pull.read_keys([public]))
        except pull.PullError as error:
            return str(error)
        return ""


def until(condition: Callable[[], object], *, timeout: float, every: float = 0.05) -> float:
    """Wait for the condition, longer on a busy machine; returns the seconds that it took."""
    began, limit = time.monotonic(), patience(timeout)
    while not condition():
        assert time.monotonic() - began < limit, f"waited {limit:.0f} s in vain"
        time.sleep(every)
    return time.monotonic() - began


def wait(read: Callable[[], Found], condition: Callable[[Found], bool], *, timeout: float) -> Found:
    limit = patience(timeout)
    deadline = time.monotonic() + limit
    while not condition(found := read()):
        assert time.monotonic() < deadline, f"not within {limit:.0f} s; last seen: {vars(found)}"
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
    settings = quick_settings(database_url, tmp_path / "var", model_roots=(roots,), signing_key_file="none")

    def start(**variables: str) -> WorkerProcess:
        started.append(WorkerProcess(environment(settings, **variables), tmp_path / f"worker-{len(started)}.log"))
        return started[-1]

    yield start
    for worker in started:
        worker.end()


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a line to the list of faults: `outcome(1, "kill -9 of a worker", recovery=7.3, lost=0, doubled=0)`."""
    outcomes: Outcomes = request.config.stash[Outcomes.KEY]

    def add(row: int, fault: str, **measured: Any) -> None:
        outcomes.lines.append(Outcome(row, fault, **measured))

    return add


@pytest.fixture
def site(clean_database: Engine, database_url: str, base_folder: Path, tmp_path: Path) -> Iterator[Site]:
    """A service on the database of the tests, its API started."""
    site = Site(database_url, tmp_path / "site", base_folder)
    try:
        site.api.start()
        yield site
    finally:
        site.close()


@contextmanager
def own_site(folder: Path, base: Path, **given: Any) -> Iterator[tuple[Site, EmbeddedPostgres]]:
    """A service on a Postgres of its own, its API started."""
    with ExitStack() as stack:
        postgres = stack.enter_context(EmbeddedPostgres(initialize(stack.enter_context(server_folder()))))
        engine = connect(postgres.url)
        upgrade(engine)
        engine.dispose()
        site = Site(postgres.url, folder / "site", base, **given)
        stack.callback(site.close)
        site.api.start()
        yield site, postgres


def postmaster(postgres: EmbeddedPostgres) -> int:
    """The pid of the server, which may be another than that of the process we started."""
    return int((postgres.data / "postmaster.pid").read_text().split("\n")[0])


@pytest.fixture
def job_table(clean_database: Engine) -> JobTable:
    return JobTable(sessions(clean_database))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()
