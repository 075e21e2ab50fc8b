from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine, func, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.audit.service import verify
from app.auth.service import create_key
from app.db.engine import connect
from app.db.migrate import ROOT, upgrade
from app.db.models import Base
from app.jobs import workers
from app.main import create_app
from app.settings import Settings
from app.signing.keys import create_key as create_signing_key
from app.signing.service import note_key
from app.storage.local import LocalStore
from tests.app.conftest import issue_keys
from tests.seeded import seed


@pytest.fixture
def empty(engine: Engine, database_url: str) -> Iterator[Engine]:
    """An empty database."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE IF EXISTS emender_empty"))
        connection.execute(text("CREATE DATABASE emender_empty"))
    fresh = connect(make_url(database_url).set(database="emender_empty").render_as_string(hide_password=False))
    yield fresh
    fresh.dispose()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE emender_empty"))


def test_migrations_match_the_models(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_concurrent_upgrades_migrate_once(empty: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: upgrade(empty), range(4)))
    assert {"jobs", "audit_events"} <= set(inspect(empty).get_table_names())


def downgrade(engine: Engine, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)
        connection.commit()


def test_downgrade_and_upgrade_of_an_empty_database(empty: Engine) -> None:
    upgrade(empty)
    downgrade(empty, "base")
    assert set(inspect(empty).get_table_names()) <= {"alembic_version"}
    upgrade(empty)
    assert "jobs" in inspect(empty).get_table_names()


def test_downgrade_and_upgrade_keep_the_rows(empty: Engine, settings: Settings, tmp_path: Path) -> None:
    """Rows survive if the older schema has their table, the audit chain too. Other rows are deleted."""
    upgrade(empty)
    url = SecretStr(empty.url.render_as_string(hide_password=False))
    given = settings.model_copy(update={"database_url": url, "webhook_secret_key": SecretStr("k" * 40)})
    app = create_app(given)
    with TestClient(app) as client, Session(empty, expire_on_commit=False) as session:
        keys = issue_keys(session)
        seed(session, client, keys, store=LocalStore(given.store_dir), folder=tmp_path / "tokenizer")
        soon = datetime.now(UTC) + timedelta(days=1)
        _, expiring = create_key(session, name="expiring", scopes=["read"], actor="test", expires_at=soon)
        note_key(session, key=create_signing_key(tmp_path / "key.pem"), actor="test")
        workers.sign_on(session, name="worker")
        session.commit()
        before = rows(session)
        assert all(before.values()), f"the seed must fill all tables: {before}"
        chain = verify(session)
        session.commit()  # or a downgrade would wait for its locks
        for revision in ("0006", "0005", "0004", "0003", "0002", "0001"):
            downgrade(empty, revision)
        upgrade(empty)
        session.expire_all()
        after = rows(session)
        added_since = {"evaluations", "signing_keys", "webhooks", "webhook_deliveries", "browser_sessions", "workers"}
        assert {name: count for name, count in after.items() if count} == {
            # The jobs of evaluations went with them.
            name: count - (name == "jobs")
            for name, count in before.items()
            if name not in added_since
        }
        assert verify(session) == chain
        assert client.get("/v1/edits", headers=keys["read"]).json()["items"]
        assert client.get("/v1/models/emoji/checkpoints/v1", headers=keys["read"]).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {expiring}"}).status_code == 401
        with pytest.raises(DBAPIError, match="takes new rows only"):
            session.execute(text("DELETE FROM audit_events"))
        session.rollback()
    with empty.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def rows(session: Session) -> dict[str, int]:
    return {
        table.name: session.scalars(select(func.count()).select_from(table)).one()
        for table in Base.metadata.sorted_tables
    }
