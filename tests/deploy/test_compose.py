"""The compose file names commands and settings that exist; nothing in it is a secret."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from app.cli import app
from app.settings import Settings

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return services


def test_the_four_services_and_the_two_tools(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {"api", "worker", "postgres", "redis", "migrate", "keys"}


@pytest.mark.parametrize("name", ["api", "worker", "migrate", "keys"])
def test_commands_exist(services: dict[str, dict[str, Any]], name: str) -> None:
    program, *words = services[name]["command"]
    assert program == "emender"
    shown = CliRunner().invoke(app, [*words, "--help"])  # --help wins over the command, after its options were parsed
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize("name", ["api", "worker", "migrate", "keys"])
def test_environment_names_settings(services: dict[str, dict[str, Any]], name: str) -> None:
    for variable in services[name]["environment"]:
        assert variable.removeprefix("EMENDER_").lower() in Settings.model_fields


def test_the_worker_alone_can_sign(services: dict[str, dict[str, Any]]) -> None:
    assert {name for name, service in services.items() if "signing-key" in service.get("secrets", [])} == {"worker"}
    assert services["worker"]["environment"]["EMENDER_SIGNING_KEY_FILE"] == "/run/secrets/signing-key"
    assert services["api"]["environment"].items() < services["worker"]["environment"].items()


def test_secrets_are_files_and_named_after_settings(services: dict[str, dict[str, Any]]) -> None:
    for secret in services["api"]["secrets"]:
        assert secret.removeprefix("emender_") in Settings.model_fields
    assert "PASSWORD" not in "".join(services["postgres"]["environment"]).replace("POSTGRES_PASSWORD_FILE", "")
