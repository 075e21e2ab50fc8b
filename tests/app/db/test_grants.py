"""Run the service as a role that owns no table: it works, and cannot rewrite history."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from app.audit.service import record
from app.auth.service import create_key
from app.cli.main import build_command
from app.db.engine import connect, sessions
from app.db.grants import APPEND_ONLY, RoleUnfit, grant_privileges
from app.db.migrate import upgrade
from app.db.models import Base
from app.main import create_app
from app.settings import Settings

pytestmark = pytest.mark.security

ROLE = "emender_service"
REWRITING = [
    statement
    for table in APPEND_ONLY
    for statement in (
        f"UPDATE {table} SET {'actor' if table == 'audit_events' else 'moved_by'} = 'nobody'",
        f"DELETE FROM {table}",
        f"TRUNCATE {table}",
    )
]


@pytest.fixture
def service_engine(clean_database: Engine, database_url: str) -> Iterator[Engine]:
    """An engine that logs in as the service's role."""
    with clean_database.begin() as connection:
        connection.execute(text(f"CREATE ROLE {ROLE} LOGIN"))
    grant_privileges(clean_database, role=ROLE)
    engine = connect(make_url(database_url).set(username=ROLE).render_as_string(hide_password=False))
    yield engine
    engine.dispose()
    with clean_database.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {ROLE}"))
        connection.execute(text(f"DROP ROLE {ROLE}"))


@pytest.fixture
def filled(clean_database: Engine) -> Engine:
    with sessions(clean_database)() as session:
        record(session, actor="test", action="test.done", target="test")
        session.commit()
    return clean_database


@contextmanager
def denied(connection: Connection, words: str) -> Iterator[None]:
    with pytest.raises(DBAPIError, match=words), connection.begin():
        yield


class TestServiceRole:
    @pytest.mark.parametrize("statement", REWRITING)
    def test_service_role_cannot_change_history(self, service_engine: Engine, statement: str) -> None:
        with service_engine.connect() as connection, denied(connection, "permission denied"):
            connection.execute(text(statement))

    def test_service_role_cannot_change_schema_or_trigger(self, service_engine: Engine) -> None:
        with service_engine.connect() as connection:
            for statement in (
                "ALTER TABLE audit_events DISABLE TRIGGER append_only",
                "DROP TABLE audit_events",
                "SET session_replication_role = replica",
                "UPDATE alembic_version SET version_num = '0001'",
                "ALTER FUNCTION refuse_change() SET search_path = ''",
            ):
                with denied(connection, "permission denied|must be owner"):
                    connection.execute(text(statement))

    def test_service_role_can_use_every_other_table(self, service_engine: Engine) -> None:
        rights = text("SELECT has_table_privilege(:table, :right)")
        with service_engine.connect() as connection:
            for table in Base.metadata.tables:
                for right in ("SELECT", "INSERT") + (() if table in APPEND_ONLY else ("UPDATE", "DELETE")):
                    assert connection.scalar(rights, {"table": table, "right": right}), (table, right)

    def test_service_starts_and_works_as_its_role(self, service_engine: Engine, settings: Settings) -> None:
        upgrade(service_engine)  # as `emender serve` does: there is nothing to do
        with sessions(service_engine)() as session:
            _, token = create_key(session, name="admin", scopes=["admin"], actor="test")
            session.commit()
        url = service_engine.url.render_as_string(hide_password=False)
        mine = settings.model_copy(update={"database_url": SecretStr(url)})
        with TestClient(create_app(mine), raise_server_exceptions=False) as client:
            headers = {"Authorization": f"Bearer {token}"}
            assert client.get("/readyz").status_code == 200
            made = client.post("/v1/keys", headers=headers, json={"name": "a", "scopes": ["read"]})
            assert made.status_code == 201, made.text
            assert client.delete(f"/v1/keys/{made.json()['id']}", headers=headers).status_code == 204
            assert client.get("/v1/audit/verify", headers=headers).json()["events"] == 3


class TestTrigger:
    @pytest.mark.parametrize("statement", REWRITING)
    def test_owner_cannot_change_history_either(self, filled: Engine, statement: str) -> None:
        with filled.connect() as connection, denied(connection, "takes new rows only"):
            connection.execute(text(statement))

    def test_trigger_also_fires_in_replica_mode(self, filled: Engine) -> None:
        with filled.connect() as connection, denied(connection, "takes new rows only"):
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            connection.execute(text("DELETE FROM audit_events"))


class TestGrant:
    def test_missing_role_and_superuser_are_refused(self, clean_database: Engine) -> None:
        with pytest.raises(RoleUnfit, match="no role 'nobody-here'"):
            grant_privileges(clean_database, role="nobody-here")
        with pytest.raises(RoleUnfit, match="superuser"):
            grant_privileges(clean_database, role="emender")

    def test_command_quotes_the_role_name(
        self, clean_database: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.cli.main.require_database_url", lambda _: database_url)
        done = CliRunner().invoke(build_command(), ["migrate", "--service-role", 'x"; DROP TABLE audit_events; --'])
        assert done.exit_code == 1
        assert "There is no role" in str(done.exception)
