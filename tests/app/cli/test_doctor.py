"""`emender doctor` names each problem with a next step, and no secret."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app.cli import doctor
from app.cli.doctor import Finding, examine
from app.cli.main import build_command
from app.db.grants import grant_privileges
from app.db.migrate import list_revisions
from app.db.models import Worker
from app.jobs import workers
from app.settings import Settings
from app.signing.keys import create_key

Found = Callable[..., dict[str, Finding]]


@pytest.fixture
def found(settings: Settings, clean_database: Engine) -> Found:
    """Run the checks with changed settings. Return the findings by the name of the check."""

    def look(**given: object) -> dict[str, Finding]:
        findings = list(examine(settings.model_copy(update={"device": "cpu", **given})))
        for finding in findings:
            assert finding.next_step or finding.state == "ok", finding
        return {finding.check: finding for finding in findings}

    return look


def expect_finding(found: dict[str, Finding], check: str, state: str, words: str) -> None:
    assert found[check].state == state and words in found[check].detail, found[check]


def test_working_installation_has_no_problems(found: Found, tmp_path: Path, clean_database: Engine) -> None:
    key = tmp_path / "key.pem"
    create_key(key)
    with Session(clean_database) as session:
        workers.sign_on(session, name="w")
        session.commit()
    findings = found(signing_key_file=key, model_roots=(tmp_path,))
    states = {check: finding.state for check, finding in findings.items()}
    assert states.pop("role") == "warning"  # of the tests' database, a superuser
    assert set(states.values()) == {"ok"}, findings
    assert len(states) == 12


class TestDatabase:
    def test_database_that_is_down_is_a_failure(self, found: Found) -> None:
        findings = found(database_url=SecretStr("postgresql://emender:s3cret@127.0.0.1:1/emender"))
        expect_finding(findings, "database", "failure", "is down or refused")
        assert "schema" not in findings and "s3cret" not in str(findings)

    def test_invalid_url_is_a_failure_without_its_secret(self, found: Found) -> None:
        findings = found(database_url=SecretStr("s3cret"))
        expect_finding(findings, "database", "failure", "is not a database URL")
        assert "s3cret" not in str(findings)

    def test_none(self, found: Found) -> None:
        expect_finding(found(database_url=None), "database", "failure", "EMENDER_DATABASE_URL is not set")

    @pytest.mark.parametrize(("revision", "state"), [(list_revisions()[1], "failure"), ("9999", "warning")])
    def test_schema_of_another_version_is_found(
        self, found: Found, clean_database: Engine, revision: str, state: str
    ) -> None:
        set_revision = text("UPDATE alembic_version SET version_num = :revision")
        with clean_database.begin() as connection:
            connection.execute(set_revision, {"revision": revision})
        try:
            expect_finding(found(), "schema", state, revision if state == "failure" else "newer")
        finally:
            with clean_database.begin() as connection:
                connection.execute(set_revision, {"revision": list_revisions()[0]})


class TestRole:
    @pytest.fixture
    def url(self, clean_database: Engine, database_url: str) -> Iterator[SecretStr]:
        """As a role that owns nothing."""
        with clean_database.begin() as connection:
            connection.execute(text("CREATE ROLE doctored LOGIN"))
        yield SecretStr(make_url(database_url).set(username="doctored").render_as_string(hide_password=False))
        with clean_database.begin() as connection:
            connection.execute(text("DROP OWNED BY doctored"))
            connection.execute(text("DROP ROLE doctored"))

    def test_granted_role_is_ok(self, found: Found, clean_database: Engine, url: SecretStr) -> None:
        grant_privileges(clean_database, role="doctored")
        assert found(database_url=url)["role"].state == "ok"

    def test_role_without_new_tables_is_a_failure(self, found: Found, clean_database: Engine, url: SecretStr) -> None:
        grant_privileges(clean_database, role="doctored")
        with clean_database.begin() as connection:
            connection.execute(text("REVOKE ALL ON workers FROM doctored"))
        findings = found(database_url=url)
        expect_finding(findings, "role", "failure", "doctored")
        assert "--service-role doctored" in str(findings["role"].next_step)


def test_clock_skew_is_a_warning(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MAX_SKEW_SECONDS", -1e6)
    expect_finding(found(), "clock", "warning", "apart")


class TestWorkers:
    def test_none(self, found: Found) -> None:
        expect_finding(found(), "workers", "warning", "No worker runs")

    def test_worker_of_another_version_is_a_warning(self, found: Found, clean_database: Engine) -> None:
        with Session(clean_database) as session:
            session.add(Worker(name="old", version="0.0.1"))
            session.commit()
        expect_finding(found(), "versions", "warning", "1 of 0.0.1")


def test_redis_that_is_down_is_a_warning(found: Found) -> None:
    findings = found(redis_url=SecretStr("redis://:s3cret@127.0.0.1:1/0"))
    expect_finding(findings, "redis", "warning", "Redis is down")
    assert "s3cret" not in str(findings)


def test_unwritable_store_is_a_failure(found: Found, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expect_finding(found(store=tmp_path / "file" / "store"), "store", "failure", "Not a directory")


def test_full_disk_is_a_warning(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**60)
    expect_finding(found(), "disk", "warning", "GiB are free")


class TestKeys:
    def test_missing_or_unusable_key_is_found(self, found: Found, tmp_path: Path) -> None:
        expect_finding(found(), "signing key", "warning", "is not set")
        expect_finding(found(signing_key_file="none"), "signing key", "warning", "without a signature")
        (tmp_path / "key.pem").write_text("s3cret")
        findings = found(signing_key_file=tmp_path / "key.pem")
        expect_finding(findings, "signing key", "failure", "no usable EC key")
        assert "s3cret" not in str(findings)

    def test_readable_key_files_are_warnings(self, found: Found, tmp_path: Path, settings: Settings) -> None:
        create_key(tmp_path / "key.pem")
        os.chmod(tmp_path / "key.pem", 0o644)
        settings.data_dir.mkdir()
        (settings.data_dir / "webhook-key").write_text("s3cret")
        os.chmod(settings.data_dir / "webhook-key", 0o644)
        findings = found(signing_key_file=tmp_path / "key.pem")
        expect_finding(findings, "signing key", "warning", "read by others")
        expect_finding(findings, "webhook key", "warning", "read by others")
        assert "s3cret" not in str(findings)


def test_missing_model_root_is_a_failure(found: Found, tmp_path: Path) -> None:
    expect_finding(found(model_roots=(tmp_path / "none",)), "model roots", "failure", "is not a folder")


def test_missing_device_is_a_failure(found: Found) -> None:
    expect_finding(found(device="cuda:7"), "torch", "failure", "cannot compute on cuda:7")


def test_command_exits_with_1_if_a_check_fails(
    settings: Settings, clean_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cli.main.read_settings", lambda: settings)
    done = CliRunner().invoke(build_command(), ["doctor"])
    assert done.exit_code == 0, done.output
    assert "ok       database: Postgres" in done.output and "→ Start one: `emender worker`." in done.output
    monkeypatch.setattr("app.cli.main.read_settings", lambda: settings.model_copy(update={"device": "cuda:7"}))
    failed = CliRunner().invoke(build_command(), ["doctor", "--json"])
    assert failed.exit_code == 1
    (torch,) = [finding for finding in json.loads(failed.output) if finding["check"] == "torch"]
    assert torch["state"] == "failure" and torch["next_step"]
