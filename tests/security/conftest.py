"""The application of tests/app, and one of everything in its database."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy.orm import Session

from app.settings import Settings
from app.storage.local import LocalStore
from tests.app.conftest import (
    Headers,
    add_model,
    application,
    built,
    client,
    keys,
    live_client,
    live_keys,
    live_model,
    model,
    plain_logs,
    store,
)
from tests.seeded import Seeded, seed

__all__ = [
    "add_model",
    "application",
    "built",
    "client",
    "keys",
    "live_client",
    "live_keys",
    "live_model",
    "model",
    "plain_logs",
    "store",
]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.security)


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(
        data_dir=tmp_path / "var",
        database_url=SecretStr(database_url),
        webhook_secret_key=SecretStr("k" * 40),
        model_roots=(tmp_path / "roots",),
    )


@pytest.fixture
def seeded(
    session: Session, client: TestClient, keys: Mapping[str, Headers], store: LocalStore, tmp_path: Path
) -> Seeded:
    return seed(session, client, keys, store=store, folder=tmp_path / "tokenizer")
