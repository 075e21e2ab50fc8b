"""Dependencies: lower bounds, the lock files, and what the API imports."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT_FILES = ("pyproject.toml", "client/pyproject.toml", "demo/pyproject.toml")
OURS = {"emender-client", "emender-demo", "emender-service"}
# Imported where installed, by code that works without them
OPTIONAL = ("attrs", "colorama", "email-validator", "greenlet", "setuptools")
PROBE = """
import json, pkgutil, sys
from importlib import import_module
from pydantic import SecretStr
import app
for module in pkgutil.walk_packages(app.__path__, "app."):
    if not module.name.startswith("app.worker"):
        import_module(module.name)
from app.main import create_app
from app.settings import Settings
create_app(Settings(database_url=SecretStr("postgresql://nowhere/emender"))).openapi()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def read_toml(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())


def read_requirements(path: str) -> list[Requirement]:
    """Dependencies, extras and dependency groups of one pyproject.toml."""
    document = read_toml(path)
    project = document["project"]
    optional = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    groups = [line for lines in document.get("dependency-groups", {}).values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *optional, *groups)]


def read_constraints() -> dict[str, str]:
    """Versions in constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    pins = [Requirement(line) for line in lines]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def read_lock() -> list[dict[str, Any]]:
    packages: list[dict[str, Any]] = read_toml("uv.lock")["package"]
    return packages


def find_installed_closure(lines: list[str]) -> set[str]:
    """Names of the distributions that these requirements install, their own included."""
    found: set[str] = set()
    pending = [(Requirement(line), "") for line in lines]
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted_extra in ("", *requirement.extras):
            if f"{name}[{wanted_extra}]" not in found:
                found |= {name, f"{name}[{wanted_extra}]"}
                try:
                    pending += [(Requirement(line), wanted_extra) for line in requires(name) or ()]
                except PackageNotFoundError:
                    pass  # of another platform
    return found


def test_api_imports_only_core_dependencies() -> None:
    core = find_installed_closure(read_toml("pyproject.toml")["project"]["dependencies"])
    assert not core & {"torch", "transformers", "diffusers"}
    probe = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    distributions = packages_distributions()
    core |= {"emender-service", *OPTIONAL}
    imported = {
        canonicalize_name(name): module
        for module in json.loads(probe.stdout)
        for name in distributions.get(module, [])[:1]
    }
    assert {name: module for name, module in imported.items() if name not in core} == {}


@pytest.mark.parametrize("path", PROJECT_FILES)
def test_every_dependency_has_a_lower_bound(path: str) -> None:
    unbounded = [
        str(requirement)
        for requirement in read_requirements(path)
        if requirement.name not in OURS and not any(bound.operator == ">=" for bound in requirement.specifier)
    ]
    assert unbounded == []


@pytest.mark.parametrize("path", PROJECT_FILES)
def test_lower_bounds_admit_the_pinned_versions(path: str) -> None:
    pins = read_constraints()
    for requirement in read_requirements(path):
        if requirement.name not in OURS:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_constraints_and_uv_lock_have_the_same_versions() -> None:
    locked = {package["name"]: package["version"] for package in read_lock() if package["name"] not in OURS}
    assert read_constraints() == locked


@pytest.mark.parametrize("path", PROJECT_FILES)
def test_uv_lock_was_made_from_the_dependencies_of_today(path: str) -> None:
    """`make lock` was run after the last change: the lock repeats the requirements of each pyproject.toml."""
    (package,) = (package for package in read_lock() if package["name"] == read_toml(path)["project"]["name"])
    metadata = package["metadata"]
    groups = [line for lines in metadata.get("requires-dev", {}).values() for line in lines]
    locked = {(line["name"], line.get("specifier", "")) for line in (*metadata["requires-dist"], *groups)}
    wanted = {
        (canonicalize_name(requirement.name), str(requirement.specifier)) for requirement in read_requirements(path)
    }
    assert locked == wanted


def test_uv_lock_names_only_pypi_and_this_clone() -> None:
    sources = {json.dumps(package["source"], sort_keys=True) for package in read_lock()}
    assert sources == {
        '{"editable": "."}',
        '{"editable": "client"}',
        '{"editable": "demo"}',
        '{"registry": "https://pypi.org/simple"}',
    }
