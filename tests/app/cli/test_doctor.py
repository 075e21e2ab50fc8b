"""Each thing broken is found, by name, with a next step; nothing secret is said."""

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
    """The findings by what was checked, with some settings changed."""

    def look(**given: object) -> dict[str, Finding]:
        findings = list(examine(settings.model_copy(update={"device": "cpu", **given})))
        for finding in findings:
            assert finding.next_step or finding.state == "ok", finding
        return {finding.check: finding for finding in findings}

    return look


def wrong(found: dict[str, Finding], check: str, state: str, words: str) -> None:
    assert found[check].state == state and words in found[check].detail, found[check]


def test_all_well(found: Found, tmp_path: Path, clean_database: Engine) -> None:
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
    def test_away(self, found: Found) -> None:
        findings = found(database_url=SecretStr("postgresql://emender:s3cret@127.0.0.1:1/emender"))
        wrong(findings, "database", "failure", "does not answer")
        assert "schema" not in findings and "s3cret" not in str(findings)

    def test_no_url(self, found: Found) -> None:
        findings = found(database_url=SecretStr("s3cret"))
        wrong(findings, "database", "failure", "no URL")
        assert "s3cret" not in str(findings)

    def test_none(self, found: Found) -> None:
        wrong(found(database_url=None), "database", "failure", "EMENDER_DATABASE_URL is not set")

    @pytest.mark.parametrize(("revision", "state"), [(list_revisions()[1], "failure"), ("9999", "warning")])
    def test_schema(self, found: Found, clean_database: Engine, revision: str, state: str) -> None:
        set_revision = text("UPDATE alembic_version SET version_num = :revision")
        with clean_database.begin() as connection:
            connection.execute(set_revision, {"revision": revision})
        try:
            wrong(found(), "schema", state, revision if state == "failure" else "newer")
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

    def test_granted(self, found: Found, clean_database: Engine, url: SecretStr) -> None:
        grant_privileges(clean_database, role="doctored")
        assert found(database_url=url)["role"].state == "ok"

    def test_granted_before_a_migration(self, found: Found, clean_database: Engine, url: SecretStr) -> None:
        grant_privileges(clean_database, role="doctored")
        with clean_database.begin() as connection:
            connection.execute(text("REVOKE ALL ON workers FROM doctored"))
        findings = found(database_url=url)
        wrong(findings, "role", "failure", "doctored")
        assert "--service-role doctored" in str(findings["role"].next_step)


def test_clocks_apart(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SKEW_SECONDS", -1e6)
    wrong(found(), "clock", "warning", "apart")


class TestWorkers:
    def test_none(self, found: Found) -> None:
        wrong(found(), "workers", "warning", "None is alive")

    def test_of_another_version(self, found: Found, clean_database: Engine) -> None:
        with Session(clean_database) as session:
            session.add(Worker(name="old", version="0.0.1"))
            session.commit()
        wrong(found(), "versions", "warning", "1 of 0.0.1")


def test_redis_away(found: Found) -> None:
    findings = found(redis_url=SecretStr("redis://:s3cret@127.0.0.1:1/0"))
    wrong(findings, "redis", "warning", "does not answer")
    assert "s3cret" not in str(findings)


def test_a_store_that_cannot_be_written_to(found: Found, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong(found(store=tmp_path / "file" / "store"), "store", "failure", "Not a directory")


def test_a_full_disk(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FREE", 2**60)
    wrong(found(), "disk", "warning", "GiB are free")


class TestKeys:
    def test_no_key(self, found: Found, tmp_path: Path) -> None:
        wrong(found(), "signing key", "warning", "is not set")
        wrong(found(signing_key_file="none"), "signing key", "warning", "without a signature")
        (tmp_path / "key.pem").write_text("s3cret")
        findings = found(signing_key_file=tmp_path / "key.pem")
        wrong(findings, "signing key", "failure", "no usable EC key")
        assert "s3cret" not in str(findings)

    def test_keys_that_others_may_read(self, found: Found, tmp_path: Path, settings: Settings) -> None:
        create_key(tmp_path / "key.pem")
        os.chmod(tmp_path / "key.pem", 0o644)
        settings.data_dir.mkdir()
        (settings.data_dir / "webhook-key").write_text("s3cret")
        os.chmod(settings.data_dir / "webhook-key", 0o644)
        findings = found(signing_key_file=tmp_path / "key.pem")
        wrong(findings, "signing key", "warning", "others may read")
        wrong(findings, "webhook key", "warning", "read by others")
        assert "s3cret" not in str(findings)


def test_no_model_root(found: Found, tmp_path: Path) -> None:
    wrong(found(model_roots=(tmp_path / "none",)), "model roots", "failure", "is no folder")


def test_a_device_that_is_not_there(found: Found) -> None:
    wrong(found(device="cuda:7"), "torch", "failure", "cannot compute on cuda:7")


def test_as_a_command(settings: Settings, clean_database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.main.read_settings", lambda: settings)
    done = CliRunner().invoke(build_command(), ["doctor"])
    assert done.exit_code == 0, done.output
    assert "ok       database: Postgres" in done.output and "→ Start one: `emender worker`." in done.output
    monkeypatch.setattr("app.cli.main.read_settings", lambda: settings.model_copy(update={"device": "cuda:7"}))
    failed = CliRunner().invoke(build_command(), ["doctor", "--json"])
    assert failed.exit_code == 1
    (torch,) = [finding for finding in json.loads(failed.output) if finding["check"] == "torch"]
    assert torch["state"] == "failure" and torch["next_step"]
