"""Run the commands of docs/how-to/backup-and-restore.md: the restored service serves the same bytes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from app.local.embedded_postgres import find_binary
from app.main import create_app
from tests.app.checkpoints.conftest import Service, base_folder, service
from tests.docs.pages import DOCS, blocks
from tests.patience import patience

__all__ = ["base_folder", "service"]

ROOT = Path(__file__).parents[2]
BACK_UP, RESTORE = [block.text for block in blocks(DOCS / "how-to" / "backup-and-restore.md") if block.language == "sh"]
EMENDER = f'emender() {{ "{sys.executable}" -m app.cli.main "$@"; }}\n'


@pytest.fixture
def empty(clean_database: Engine, database_url: str) -> Iterator[str]:
    """The URL of an empty database."""
    with clean_database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE emender_restored"))
    yield make_url(database_url).set(database="emender_restored").render_as_string(hide_password=False)
    with clean_database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE emender_restored WITH (FORCE)"))


def pull(client: TestClient, service: Service, version: str) -> dict[str, bytes]:
    """Return every file of the version, as the Hub serves it."""
    hub, name = f"/api/models/emender/{service.model.name}/revision/{version}", service.model.name
    listed = client.get(hub, headers=service.keys["read"])
    assert listed.status_code == 200, listed.text
    paths = [file["rfilename"] for file in listed.json()["siblings"]]
    answers = {
        path: client.get(f"/emender/{name}/resolve/{version}/{path}", headers=service.keys["read"]) for path in paths
    }
    assert {answer.status_code for answer in answers.values()} == {200}
    return {path: answer.content for path, answer in answers.items()}


def sh(script: str, *, url: str, folder: Path, backup: Path) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    given = {
        "EMENDER_DATABASE_URL": url.replace("+psycopg", ""),
        "EMENDER_DATA_DIR": str(folder),
        "BACKUP": str(backup),
    }
    path = f"{Path(find_binary('pg_dump')).parent}:{own['PATH']}"  # of the version of the server
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", EMENDER + script],
        env=own | given | {"PATH": path, "EMENDER_SIGNING_KEY_FILE": "none", "EMENDER_DEVICE": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=patience(240),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_restored_service_serves_the_same_bytes(
    service: Service, empty: str, database_url: str, tmp_path: Path
) -> None:
    service.edit("fox")
    version = service.apply(edits="ready")["version"]
    before = pull(service.client, service, version)
    assert "text_encoder/model.safetensors" in before
    backup, folder = tmp_path / "backup", tmp_path / "restored"
    sh(BACK_UP, url=database_url, folder=service.settings.data_dir, backup=backup)
    output = sh(RESTORE, url=empty, folder=folder, backup=backup)
    assert "events verified" in output and "0 damaged, 0 missing" in output

    settings = service.settings.model_copy(update={"database_url": SecretStr(empty), "data_dir": folder})
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        assert pull(client, service, version) == before
        made = client.post(
            f"/v1/models/{service.model.name}/edits",
            json={"source": "owl", "destination": {"prompt": "dog"}},
            headers=service.keys["edit"],
        )
        assert made.status_code == 202, made.text
