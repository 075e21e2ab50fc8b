import csv
import io
import json
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, update
from typer.testing import CliRunner

from app.audit.service import record
from app.cli.main import build_command
from app.db.engine import sessions
from app.db.models import AuditEvent
from app.settings import Settings
from tests.conftest import rewritable_history


@pytest.fixture
def log(clean_database: Engine, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An audit log of three events."""
    mine = settings.model_copy(update={"database_url": SecretStr(database_url)})
    monkeypatch.setattr("app.cli.audit.read_settings", lambda: mine)
    with sessions(clean_database)() as session:
        for number in (1, 2, 3):
            record(session, actor="key:a", action="edit.create", target=f"edit:{number}", reason="=1+1")
        session.commit()
    return clean_database


def emender(*arguments: Any) -> Any:
    return CliRunner().invoke(build_command(), ["audit", *arguments])


class TestVerify:
    def test_valid_log_is_verified(self, log: Engine) -> None:
        done = emender("verify")
        assert done.exit_code == 0
        head = done.stdout.split()[-1]
        assert done.stdout == f"3 events verified. Head: {head}\n"
        assert emender("verify", "--head", head).exit_code == 0
        cut = emender("verify", "--head", "0" * 64)
        assert cut.exit_code == 1
        assert "cut short" in cut.stderr

    def test_changed_event_is_named(self, log: Engine) -> None:
        with log.begin() as connection, rewritable_history(connection):
            connection.execute(update(AuditEvent).where(AuditEvent.sequence == 2).values(reason="another"))
        done = emender("verify")
        assert done.exit_code == 1
        assert done.stderr.startswith("Broken at event 2: its hash is not that of its content")
        assert json.loads(emender("verify", "--json").stdout)["broken_at"] == 2


class TestExport:
    def test_ndjson_has_one_event_per_line(self, log: Engine) -> None:
        lines = [json.loads(line) for line in emender("export").stdout.splitlines()]
        assert [line["sequence"] for line in lines] == [1, 2, 3]
        assert lines[0]["reason"] == "=1+1"
        assert emender("export", "--target", "edit:2").stdout.count("\n") == 1
        assert emender("export", "--until", "2020-01-01").stdout == ""

    def test_csv_has_no_formulas(self, log: Engine) -> None:
        rows = list(csv.DictReader(io.StringIO(emender("export", "--format", "csv").stdout, newline="")))
        assert [row["target"] for row in rows] == ["edit:1", "edit:2", "edit:3"]
        assert rows[0]["reason"] == "'=1+1"

    def test_unknown_format_is_an_error(self, log: Engine) -> None:
        assert emender("export", "--format", "xml").exit_code == 2
