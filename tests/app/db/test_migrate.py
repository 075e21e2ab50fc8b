import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
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

import editing
from app.audit.service import verify
from app.auth.service import create_key
from app.db.engine import connect
from app.db.migrate import ROOT, upgrade
from app.db.models import Base, EditValue, Job
from app.jobs import workers
from app.main import create_app
from app.settings import Settings
from app.signing.keys import create_key as create_signing_key
from app.signing.service import record_key
from app.storage.local import LocalStore
from editing.values import EncoderValue
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
        record_key(session, key=create_signing_key(tmp_path / "key.pem"), actor="test")
        workers.sign_on(session, name="worker")
        session.commit()
        before = rows(session)
        assert all(before.values()), f"the seed must fill all tables: {before}"
        newer = select(func.count()).where(Job.kind.in_(("evaluate_checkpoint", "deliver_webhook")))
        newer_jobs = session.scalars(newer).one()
        chain = verify(session)
        session.commit()  # or a downgrade would wait for its locks
        for revision in ("0006", "0005", "0004", "0003", "0002", "0001"):
            downgrade(empty, revision)
        upgrade(empty)
        session.expire_all()
        after = rows(session)
        added_since = {"evaluations", "signing_keys", "webhooks", "webhook_deliveries", "browser_sessions", "workers"}
        assert {name: count for name, count in after.items() if count} == {
            name: count - (newer_jobs if name == "jobs" else 0)
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


def test_values_are_joined_and_split_by_encoder(empty: Engine) -> None:
    """Migration 0012 makes one safetensors file of an edit's rows; its downgrade restores them."""
    upgrade(empty)
    downgrade(empty, "0011")
    norms = {"delta_norm": 2.0, "hidden_norm": 8.0}
    losses = {"text": [2.0, 1.0], "noise": [], **norms, "settings": {"seed": 3}, "balance": {"note": "n"}}
    vectors = {"text_encoder": torch.arange(6.0), "text_encoder_2": torch.arange(10.0)}
    with empty.begin() as connection:
        insert = """
            WITH model AS (
                INSERT INTO base_models (id, namespace, name, source, encoders, state, created_by)
                VALUES (gen_random_uuid(), 'n', 'm', 's', '[]', 'ready', 't') RETURNING id
            ) INSERT INTO edits (id, model_id, source, destination, templates, settings, labels, state, created_by)
            SELECT gen_random_uuid(), id, 'fox', '{"prompt": "owl"}', '{}', '{"seed": 3}', '{}', 'ready', 't'
            FROM model"""
        connection.execute(text(insert))
        for encoder, both in vectors.items():
            delta, hidden = (half.numpy().tobytes() for half in both.chunk(2))
            insert = """
                INSERT INTO edit_values (edit_id, encoder, layer, delta, hidden, sha256, losses, attempt, engine)
                SELECT id, :encoder, :layer, :delta, :hidden, :sha256, CAST(:losses AS jsonb), 2, '3' FROM edits"""
            row = {"encoder": encoder, "layer": len(both), "delta": delta, "hidden": hidden}
            sha256 = hashlib.sha256(delta + hidden).hexdigest()
            connection.execute(text(insert), row | {"sha256": sha256, "losses": json.dumps(losses)})
        before = connection.execute(text("SELECT * FROM edit_values ORDER BY encoder")).mappings().all()
    upgrade(empty)
    with Session(empty) as session:
        stored = session.scalars(select(EditValue)).one()
        value = editing.EditValue(
            {name: EncoderValue(len(both), *both.chunk(2)) for name, both in vectors.items()}, engine_version="3"
        )
        assert stored.content == value.to_safetensors()
        assert stored.sha256 == hashlib.sha256(stored.content).hexdigest()
        assert stored.encoders == [{"name": name, "layer": len(both), **norms} for name, both in vectors.items()]
        assert (stored.losses, stored.balance) == ({"text": [2.0, 1.0], "noise": []}, {"note": "n"})
    downgrade(empty, "0011")
    with empty.connect() as connection:
        after = connection.execute(text("SELECT * FROM edit_values ORDER BY encoder")).mappings().all()
    assert [dict(row) for row in after] == [dict(row) for row in before]


def rows(session: Session) -> dict[str, int]:
    return {
        table.name: session.scalars(select(func.count()).select_from(table)).one()
        for table in Base.metadata.sorted_tables
    }
