"""The compose file names commands and settings that exist; nothing in it is a secret."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from app.cli.main import build_command
from app.settings import Settings

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return services


def test_the_four_services_the_tools_and_what_watches(services: dict[str, dict[str, Any]]) -> None:
    profiles = {name: service.get("profiles", []) for name, service in services.items()}
    assert {name for name, found in profiles.items() if not found} == {"api", "worker", "postgres", "redis", "migrate"}
    assert {name for name, found in profiles.items() if found == ["monitoring"]} == {
        "prometheus",
        "grafana",
        "rq-dashboard",
    }
    assert profiles["keys"] == ["tools"]


@pytest.mark.parametrize("name", ["api", "worker", "migrate", "keys"])
def test_commands_exist(services: dict[str, dict[str, Any]], name: str) -> None:
    program, *words = services[name]["command"]
    assert program == "emender"
    shown = CliRunner().invoke(
        build_command(), [*words, "--help"]
    )  # --help wins over the command, after its options were parsed
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
    for service in services.values():
        for name in service.get("environment", {}):
            assert "PASSWORD" not in name or name.endswith("_FILE")
    assert {name for name, service in services.items() if "service-password" in service.get("secrets", [])} == {
        "postgres"
    }


def test_migrations_run_as_the_owner_and_nothing_else_does(services: dict[str, dict[str, Any]]) -> None:
    owners = [{"source": "owner-database-url", "target": "emender_database_url"}]
    assert {name for name, service in services.items() if service.get("secrets") == owners} == {"migrate"}
    role = services["migrate"]["command"][-1]
    assert f"CREATE ROLE {role} LOGIN" in (COMPOSE.parent / "deploy/postgres/service-role.sql").read_text()
    assert services["postgres"]["environment"]["POSTGRES_USER"] != role


def test_what_is_built_and_mounted_is_there(services: dict[str, dict[str, Any]]) -> None:
    targets = re.findall(r"^FROM .* AS ([\w-]+)$", (COMPOSE.parent / "deploy/Containerfile").read_text(), re.MULTILINE)
    for service in services.values():
        if "build" in service:
            assert service["build"]["target"] in targets
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./deploy") or (COMPOSE.parent / source).exists()


def test_what_the_images_copy_is_not_ignored() -> None:
    copied = re.findall(
        r"^COPY (?!--from)(.+) \S+$", (COMPOSE.parent / "deploy/Containerfile").read_text(), re.MULTILINE
    )
    sent = {line.removeprefix("!") for line in (COMPOSE.parent / ".dockerignore").read_text().split() if line[0] == "!"}
    paths = [path for line in copied for path in line.split()]
    assert paths and set(paths) <= sent
