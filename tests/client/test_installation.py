"""The client's distribution in an environment of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import patience

ROOT = Path(__file__).parents[2]
MAX_PACKAGES = 14
MAX_MEGABYTES = 30

pytestmark = [pytest.mark.clients, pytest.mark.slow]


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=patience(250), check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stdout + done.stderr).strip()


def install(venv: Path, *, extra: str = "") -> None:
    """Install the client into a new environment, from a copy since setuptools builds in the source folder."""
    source = venv.parent / "source"
    shutil.copytree(ROOT / "client", source, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "build"))
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    pip = [sys.executable, "-m", "pip", "--python"]
    run(*pip, venv, "install", "-q", "-c", ROOT / "constraints.txt", f"{source}{extra}", cwd=venv.parent)


def test_client_installs_few_small_packages_and_needs_no_service(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    install(venv)
    listing = run(sys.executable, "-m", "pip", "--python", venv, "list", "--format", "json", cwd=tmp_path)
    packages = [package["name"] for package in json.loads(listing.splitlines()[0])]
    assert len(packages) <= MAX_PACKAGES, packages
    size = sum(path.stat().st_size for path in venv.glob("lib/**/*") if path.is_file())
    assert size <= MAX_MEGABYTES * 1e6
    (tmp_path / "app").mkdir()
    (tmp_path / "app/__init__.py").write_text("NAME = 'mine'\n")
    (tmp_path / "script.py").write_text("import app, emender\nprint(app.NAME, emender.Client, emender.__version__)\n")
    assert run(venv / "bin/python", "script.py", cwd=tmp_path).startswith("mine <class 'emender._sync.client.Client'>")
    assert "pip install 'emender-client[cli]'" in run(venv / "bin/emender", cwd=tmp_path, code=1)


def test_extra_cli_adds_the_commands_of_the_client(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    install(venv, extra="[cli]")
    for command in ([venv / "bin/emender"], [venv / "bin/python", "-m", "emender"]):
        help_text = run(*command, "--help", cwd=tmp_path)
        assert "apply" in help_text and "aliases" in help_text and "serve" not in help_text
