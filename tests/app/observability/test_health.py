"""Break each dependency in turn; /readyz names it."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.api.problems import MEDIA_TYPE
from app.api.rate_limit import RateLimits
from app.db.migrate import list_revisions
from app.main import create_app
from app.settings import Settings
from app.storage import open_store
from app.storage.local import LocalStore
from app.storage.store import StoreUnavailable
from tests.servers import S3Server


def missing(client: TestClient) -> dict[str, str]:
    """Return what /readyz reports as missing, and check that it is a problem document."""
    answer = client.get("/readyz")
    assert answer.status_code == 503 and answer.headers["Content-Type"] == MEDIA_TYPE
    assert answer.headers["Retry-After"]
    problem: dict[str, Any] = answer.json()
    assert problem["title"] == "Not ready"
    return {error["pointer"]: error["detail"] for error in problem["errors"]}


def test_ready_service_leaves_no_files(client: TestClient, store: LocalStore) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    assert list(store.list_blobs()) == [] and not [path for path in store.folder.rglob("*") if path.is_file()]


def test_every_missing_dependency_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("")
    away: dict[str, Any] = {
        "database_url": SecretStr("postgresql://127.0.0.1:1/x"),
        "redis_url": SecretStr("redis://127.0.0.1:1/0"),
    }
    with TestClient(create_app(Settings(**away, data_dir=folder))) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        found = missing(client)
    assert set(found) == {"database", "store"}
    assert "does not respond" in found["database"] and "127.0.0.1" not in str(found)
    assert "Not a directory" in found["store"]


def test_missing_redis_is_degraded(client: TestClient, application: FastAPI, settings: Settings) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    application.state.health.limits = RateLimits(away)
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready" and "workers poll" in answer.json()["degraded"]["redis"]


class TestSchema:
    def test_missing_migrations_are_named(self, client: TestClient, session: Session) -> None:
        session.execute(text("UPDATE alembic_version SET version_num = :old"), {"old": list_revisions()[1]})
        found = missing(client)
        assert set(found) == {"schema"} and "emender migrate" in found["schema"]

    def test_missing_schema_is_named(self, client: TestClient, session: Session) -> None:
        session.execute(text("DROP TABLE alembic_version"))
        assert "no schema" in missing(client)["schema"]

    def test_newer_schema_is_degraded(self, client: TestClient, session: Session) -> None:
        """During a rollout the migrations are applied before the old version stops."""
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        answer = client.get("/readyz")
        assert answer.status_code == 200 and "newer" in answer.json()["degraded"]["schema"]


class TestStore:
    def test_store_is_probed_once_in_the_cache_time(
        self, client: TestClient, store: LocalStore, application: FastAPI
    ) -> None:
        assert client.get("/readyz").status_code == 200
        store.folder.rename(store.folder.with_name("away"))
        store.folder.write_text("")
        application.state.health.store_problem.seconds = 3600
        assert client.get("/readyz").status_code == 200
        application.state.health.store_problem.seconds = 0
        assert set(missing(client)) == {"store"}

    def test_bucket_is_probed_and_left_empty(self, s3_server: S3Server, tmp_path: Path) -> None:
        store = open_store(Settings(**s3_server.settings(tmp_path)))
        store.probe()
        assert list(store.list_blobs()) == []
        wrong = s3_server.settings(tmp_path) | {"s3_secret_access_key": "wrong"}
        with pytest.raises(StoreUnavailable):
            open_store(Settings(**wrong)).probe()
