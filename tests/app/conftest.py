"""The application on the test's transaction, a key for each scope, and a model that is ready to be edited."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from tokenizers import pre_tokenizers

from app.api.rate_limit import RateLimits
from app.auth.service import SCOPES, create_key
from app.db.models import Model, ModelFile
from app.main import LOCK_SECONDS, create_app
from app.observability.health import Health
from app.settings import Settings
from app.storage.local import LocalStore
from tests.patience import patience

Headers = dict[str, str]


@pytest.fixture(autouse=True, scope="session")
def plain_logs() -> None:
    """Without the variables that structlog shows by default, which take seconds to draw for each traceback."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
        ]
    )


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(data_dir=tmp_path / "var", database_url=SecretStr(database_url))


@pytest.fixture
def store(settings: Settings) -> LocalStore:
    return LocalStore(settings.store_dir)


@pytest.fixture(scope="session")
def built(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The application, built once a run; `application` gives it the test's own session and folders."""
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("app"), database_url=SecretStr(database_url)))


@pytest.fixture
def application(built: FastAPI, settings: Settings, store: LocalStore, session: Session) -> FastAPI:
    """The application; each request's transaction is a savepoint of the test's, which sees what it wrote."""
    built.state.settings = settings
    built.state.store = store
    built.state.rate_limits = RateLimits(settings)
    built.state.sessions = sessionmaker(
        session.connection(), expire_on_commit=False, join_transaction_mode="create_savepoint"
    )
    built.state.health = Health(built.state.sessions, store, built.state.rate_limits)
    return built


@pytest.fixture
def client(application: FastAPI) -> Iterator[TestClient]:
    """A client that answers errors as a server would, instead of raising them."""
    with TestClient(application, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def keys(session: Session) -> Mapping[str, Headers]:
    """The headers of a key with one scope each: `client.get(url, headers=keys["read"])`."""
    return issue_keys(session)


@pytest.fixture
def add_model(session: Session, store: LocalStore, tmp_path: Path) -> Callable[..., Model]:
    """Add a model, ready unless said otherwise; its tokenizer's files are in the store."""

    def add(name: str = "emoji", **columns: Any) -> Model:
        return register(session, store, folder=tmp_path / "tokenizer", name=name, **columns)

    return add


@pytest.fixture
def model(add_model: Callable[..., Model]) -> Model:
    return add_model()


@pytest.fixture
def live_client(settings: Settings, clean_database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A client of the application on real connections of its own, which commits: for tests with parallel requests."""
    monkeypatch.setattr("app.main.LOCK_SECONDS", patience(LOCK_SECONDS))  # parallel requests wait for each other
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def live_keys(clean_database: Engine) -> Mapping[str, Headers]:
    with Session(clean_database, expire_on_commit=False) as session:
        return issue_keys(session)


@pytest.fixture
def live_model(clean_database: Engine, store: LocalStore, tmp_path: Path) -> Model:
    with Session(clean_database, expire_on_commit=False) as session:
        return register(session, store, folder=tmp_path / "tokenizer")


def issue_keys(session: Session) -> Mapping[str, Headers]:
    issued: dict[str, Headers] = {}
    for scope in SCOPES:
        _, token = create_key(session, name=f"test {scope}", scopes=[scope], actor="test")
        issued[scope] = {"Authorization": f"Bearer {token}"}
    session.commit()
    return issued


def register(session: Session, store: LocalStore, *, folder: Path, name: str = "emoji", **columns: Any) -> Model:
    """A row for a model of 4 layers and its tokenizer in the store; commits."""
    write_tokenizer(folder)
    given: dict[str, Any] = {
        "name": name,
        "namespace": "emender",
        "source": name,
        "state": "ready",
        "family": "sd1",
        "encoders": [{"name": "text_encoder", "layers": 4, "width": 64, "mlp_width": 256}],
        "digest": "d" * 64,
        "created_by": "test",
    }
    model = Model(**(given | columns))
    for path in sorted(folder.iterdir()):
        sha256 = store.put_file(path)
        model.files.append(ModelFile(path=f"tokenizer/{path.name}", sha256=sha256, size=path.stat().st_size))
    session.add(model)
    session.commit()
    return model


def write_tokenizer(folder: Path, *, max_length: int = 77) -> None:
    """CLIP's byte-pair tokenizer with no merges: each byte is a token, so lengths are easy to reckon."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *[letter + "</w>" for letter in alphabet], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": max_length}))
