"""The service's commands, in processes of their own where that matters."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from typer.testing import CliRunner

from app.cli.main import build_command
from app.main import create_app
from app.settings import Settings
from emender import Client
from emender.cli.errors import ExitCode
from tests.app.checkpoints.conftest import Service, base_folder, service
from tests.patience import patience

__all__ = ["base_folder", "service"]


def emender(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with only these settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    command = [sys.executable, "-m", "app.cli.main", *arguments]
    return subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=patience(120), check=False
    )


def test_invalid_setting_is_named() -> None:
    done = emender("migrate", EMENDER_PORT="many")
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("EMENDER_PORT: ")


def test_missing_database_is_an_error() -> None:
    for command, code in {
        ("migrate",): ExitCode.USAGE,
        ("worker",): ExitCode.USAGE,
        ("keys", "create", "ci", "--scope", "read"): ExitCode.UNREACHABLE,
    }.items():
        done = emender(*command)
        assert done.returncode == code
        assert "EMENDER_DATABASE_URL is not set" in done.stderr
    nowhere = "postgresql://127.0.0.1:9/none"
    assert emender("migrate", EMENDER_DATABASE_URL=nowhere).returncode == ExitCode.UNREACHABLE


def test_first_key_opens_the_api_with_its_scopes_only(
    clean_database: Engine, database_url: str, settings: Settings
) -> None:
    assert emender("migrate", EMENDER_DATABASE_URL=database_url).returncode == 0
    created = emender("keys", "create", "deploy", "--scope", "read", "--json", EMENDER_DATABASE_URL=database_url)
    assert created.returncode == 0, created.stderr
    with TestClient(create_app(settings)) as client:
        headers = {"Authorization": f"Bearer {json.loads(created.stdout)['token']}"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/v1/keys", headers=headers).status_code == 403
    rejected = emender("keys", "create", "deploy", "--scope", "root", EMENDER_DATABASE_URL=database_url)
    assert rejected.returncode == ExitCode.USAGE
    assert "'root'" in rejected.stderr


def test_keys_are_listed_and_revoked(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, scope: str = "admin") -> Any:
        token = service.keys[scope]["Authorization"].removeprefix("Bearer ")
        client = Client("http://testserver", api_key=token, transport=service.client._transport)
        monkeypatch.setattr("emender.cli.console.create_client", lambda: client)
        return CliRunner().invoke(build_command(), arguments)

    listed = json.loads(run("keys", "list", "--json").output.splitlines()[-1])
    assert {key["name"] for key in listed} == {f"test {scope}" for scope in service.keys}
    victim = next(key["id"] for key in listed if key["name"] == "test edit")
    revoked = json.loads(run("keys", "revoke", victim, "--json").output.splitlines()[-1])
    assert revoked == {"id": victim, "revoked": True}
    assert run("edits", "list", scope="edit").exception.code == ExitCode.UNAUTHORIZED
    assert victim in run("keys", "list").output
