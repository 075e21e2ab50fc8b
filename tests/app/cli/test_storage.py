"""`emender storage` on a folder and on a bucket."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, select
from typer.testing import CliRunner, Result

from app.cli.main import build_command
from app.db.engine import Sessions, sessions
from app.db.models import AuditEvent, Image
from app.local.supervisor import to_environment
from app.settings import Settings
from app.storage import open_store
from tests.app.storage.conftest import Damage, damage, store, store_settings
from tests.patience import patience

__all__ = ["damage", "store", "store_settings"]

Command = Callable[..., Result]


def emender(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    command = [sys.executable, "-m", "app.cli.main", "storage", *arguments]
    return subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=patience(120), check=False
    )


@pytest.fixture
def command(store_settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    settings = store_settings.model_copy(update={"database_url": SecretStr(database_url)})
    monkeypatch.setattr("app.cli.storage.read_settings", lambda: settings)
    return lambda *arguments: CliRunner().invoke(build_command(), ["storage", *arguments])


@pytest.fixture
def factory(clean_database: Engine) -> Sessions:
    return sessions(clean_database)


def test_scrub_names_damaged_and_missing_blobs(
    command: Command, store_settings: Settings, factory: Sessions, damage: Damage
) -> None:
    blobs = open_store(store_settings)
    sha256 = blobs.put(b"a picture")
    with factory() as session:
        session.add(Image(sha256=sha256, width=1, height=1, size=9, created_by="test"))
        session.commit()
    done = command("scrub")
    assert (done.exit_code, done.stdout) == (0, "1 blobs, 9 bytes: 0 damaged, 0 missing.\n")
    damage(sha256, b"A picture")
    done = command("scrub", "--quarantine", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {
        "blobs": 1,
        "bytes": 9,
        "damaged": [{"sha256": sha256, "references": [f"image:sha256:{sha256}"]}],
        "missing": [],
        "quarantined": True,
    }
    done = command("scrub")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[:2] == [f"missing: {sha256}", f"  image:sha256:{sha256}"]
    blobs.put(b"a picture")
    assert command("scrub").exit_code == 0


def test_collect_counts_blobs_without_references(command: Command, store_settings: Settings, factory: Sessions) -> None:
    blobs = open_store(store_settings)
    sha256 = blobs.put(b"forgotten")
    done = command("collect", "--json")
    assert json.loads(done.stdout) == {"blobs": 0, "bytes": 0, "temporary_files": 0, "dry_run": False}
    assert command("collect", "--grace", "0").exit_code == 2
    assert sha256 in blobs
    with factory() as session:
        assert session.scalars(select(AuditEvent)).all() == []


@pytest.mark.slow
def test_collect_deletes_old_blobs_of_a_folder(tmp_path: Path, database_url: str, factory: Sessions) -> None:
    settings = Settings(data_dir=tmp_path, database_url=SecretStr(database_url))
    blobs = open_store(settings)
    forgotten, named = blobs.put(b"forgotten"), blobs.put(b"named")
    for sha256 in (forgotten, named):
        os.utime(blobs.fetch(sha256), (time.time() - 7200, time.time() - 7200))
    with factory() as session:
        session.add(Image(sha256=named, width=1, height=1, size=5, created_by="test"))
        session.commit()
    given = to_environment(settings)
    assert emender("collect", **given).stdout == "Deleted 0 blobs of 0 bytes, and 0 unfinished files.\n"
    assert emender("collect", "--grace", "1", "--dry-run", **given).stdout == "Would delete 1 blobs of 9 bytes.\n"
    assert forgotten in blobs
    assert emender("collect", "--grace", "1", **given).stdout.startswith("Deleted 1 blobs of 9 bytes")
    assert forgotten not in blobs and named in blobs


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({}, 3, "EMENDER_DATABASE_URL is not set"),
        ({"EMENDER_DATABASE_URL": "postgresql://emender@127.0.0.1:9/emender"}, 3, "The database is down"),
        ({"EMENDER_STORE": "gs://bucket"}, 2, "EMENDER_STORE: Value error, Give a folder, or a bucket"),
        ({"EMENDER_STORE": "s3://UPPER/../x"}, 2, "Give a folder, or a bucket as s3://bucket/prefix."),
    ],
)
def test_invalid_settings_are_errors(tmp_path: Path, given: dict[str, str], code: int, said: str) -> None:
    done = emender("scrub", EMENDER_DATA_DIR=str(tmp_path), **given)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_bucket_that_is_down_is_an_error(tmp_path: Path, database_url: str, clean_database: Engine) -> None:
    given = {"EMENDER_STORE": "s3://bucket", "EMENDER_S3_ENDPOINT": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "key"}
    secret = {"AWS_SECRET_ACCESS_KEY": "a secret value", "EMENDER_DATABASE_URL": database_url}
    done = emender("scrub", EMENDER_DATA_DIR=str(tmp_path), **given, **secret)
    assert (done.returncode, done.stdout) == (3, "")
    assert "s3://bucket: the request to the store failed" in done.stderr and "Traceback" not in done.stderr
    assert "a secret value" not in done.stderr
