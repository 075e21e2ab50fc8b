"""A runner over committed rows, and a tiny pipeline that it can edit."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine, select

from app.db.engine import Sessions, sessions
from app.db.models import AuditEvent, Edit, Job, Model
from app.jobs.enqueue import enqueue, enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT, REGISTER_MODEL
from app.main import create_app
from app.settings import Settings
from app.storage.local import LocalStore
from app.worker.runner import Runner
from tests.app.conftest import Headers, issue_keys
from tests.pipelines import write_pipeline

QUICK = {"objective": "text", "optimization_steps": 3}


@dataclass
class Service:
    """The application and a worker on a database that commits."""

    client: TestClient
    keys: Mapping[str, Headers]
    runner: Runner

    def work(self) -> None:
        while self.runner.work():
            pass

    def get(self, path: str) -> Any:
        answer = self.client.get(path, headers=self.keys["read"])
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: object, *, status: int) -> Any:
        answer = self.client.post(path, json=body, headers=self.keys["admin"])
        assert answer.status_code == status, answer.text
        return answer.json()


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with the pipeline `tiny`."""
    folder = tmp_path_factory.mktemp("roots")
    write_pipeline(folder / "tiny")
    return folder


@pytest.fixture
def settings(tmp_path: Path, database_url: str, roots: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "var",
        database_url=SecretStr(database_url),
        model_roots=(roots,),
        poll_interval_seconds=0.1,
        lease_seconds=20,
        torch_threads=1,
        device="cpu",
    )


@pytest.fixture
def store(settings: Settings) -> LocalStore:
    return LocalStore(settings.store_dir)


@pytest.fixture
def factory(clean_database: Engine) -> Sessions:
    return sessions(clean_database)


@pytest.fixture
def stopping() -> threading.Event:
    return threading.Event()


@pytest.fixture
def runner(settings: Settings, store: LocalStore, factory: Sessions, stopping: threading.Event) -> Runner:
    return Runner(settings=settings, sessions=factory, store=store, worker="test", stopping=stopping)


@pytest.fixture
def add_model(factory: Sessions) -> Callable[..., Model]:
    """Add the row of a model that is still to be registered, unless said otherwise."""

    def add(name: str = "tiny", **columns: Any) -> Model:
        given = {"name": name, "namespace": "emender", "source": name, "created_by": "test"}
        with factory() as session:
            model = Model(**(given | columns))
            session.add(model)
            session.commit()
            return model

    return add


@pytest.fixture
def registered(add_model: Callable[..., Model], runner: Runner, factory: Sessions) -> Model:
    """The tiny pipeline, registered by its job."""
    model = add_model()
    with factory() as session:
        enqueue(session, kind=REGISTER_MODEL, target_id=model.id, actor="test")
        session.commit()
    assert runner.work()
    with factory() as session:
        return session.get_one(Model, model.id)


@pytest.fixture
def add_edits(factory: Sessions) -> Callable[..., list[UUID]]:
    """Queue edits, each given by its columns; returns the ids of their jobs."""

    def add(model: Model, *edits: dict[str, Any]) -> list[UUID]:
        given = {"destination": {"prompt": "dog"}, "templates": ["a {}", "{}"], "settings": QUICK, "created_by": "test"}
        with factory() as session:
            rows = [Edit(model_id=model.id, **({"source": f"cat {n}"} | given | edit)) for n, edit in enumerate(edits)]
            session.add_all(rows)
            session.flush()
            job_ids = enqueue_many(session, kind=OPTIMIZE_EDIT, actor="test", target_ids=[row.id for row in rows])
            session.commit()
            return job_ids

    return add


@pytest.fixture
def job(factory: Sessions) -> Callable[[UUID], Job]:
    """A job as it is now."""

    def read(job_id: UUID) -> Job:
        with factory() as session:
            return session.get_one(Job, job_id)

    return read


@pytest.fixture
def edit(factory: Sessions) -> Callable[[UUID], Edit]:
    """The edit of a job as it is now, with its value."""

    def read(job_id: UUID) -> Edit:
        with factory() as session:
            found = session.get_one(Edit, session.get_one(Job, job_id).target_id)
            _ = found.value  # load it while the session is open
            return found

    return read


@pytest.fixture
def actions(factory: Sessions) -> Callable[[], list[str]]:
    """What the audit log says was done, in order."""

    def read() -> list[str]:
        with factory() as session:
            return list(session.scalars(select(AuditEvent.action).order_by(AuditEvent.sequence)))

    return read


@pytest.fixture
def service(settings: Settings, factory: Sessions, runner: Runner) -> Iterator[Service]:
    with factory() as session:
        keys = issue_keys(session)
        session.commit()
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield Service(client, keys, runner)
