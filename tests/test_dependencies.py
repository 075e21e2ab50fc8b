"""What the API and the command line import is what `pip install emender` brings, without an extra."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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


def closure(wanted: list[str]) -> set[str]:
    """The distributions that these requirements bring, themselves too."""
    found: set[str] = set()
    waiting = [(Requirement(line), "") for line in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted_extra in ("", *requirement.extras):
            if f"{name}[{wanted_extra}]" not in found:
                found |= {name, f"{name}[{wanted_extra}]"}
                try:
                    waiting += [(Requirement(line), wanted_extra) for line in requires(name) or ()]
                except PackageNotFoundError:
                    pass  # of another platform
    return found


def test_the_api_needs_no_more_than_the_core() -> None:
    core = closure(PROJECT["dependencies"])
    assert not core & {"torch", "transformers", "diffusers"}
    ran = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    distributions = packages_distributions()
    core |= {"emender", "setuptools", "attrs", "greenlet"}  # used where they are, by what can do without them
    imported = {
        canonicalize_name(name): module
        for module in json.loads(ran.stdout)
        for name in distributions.get(module, [])[:1]
    }
    assert {name: module for name, module in imported.items() if name not in core} == {}


def test_every_version_is_pinned() -> None:
    pinned = {
        canonicalize_name(Requirement(line).name) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]
    }
    wanted = PROJECT["dependencies"] + [
        line for extra in ("worker", "tracing") for line in PROJECT["optional-dependencies"][extra]
    ]
    assert {name for name in closure(wanted) if "[" not in name} - pinned == set()
