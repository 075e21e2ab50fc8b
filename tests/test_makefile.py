"""The Makefile: which interpreter it accepts, and when it makes .venv again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import patience

ROOT = Path(__file__).parents[1]
REMAKE = "-m venv --clear .venv"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the files that `make install` reads, and a .venv made with this interpreter."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "client/pyproject.toml", "demo/pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / ".venv/.installed").touch()
    return tmp_path


def write_interpreter(path: Path, version: str) -> Path:
    """An executable that runs Python code as this interpreter does, but under another version number."""
    numbers = ", ".join(version.split("."))
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = ({numbers})\n$2"\n')
    path.chmod(0o755)
    return path


def run_make(clone: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run make as from a shell, also when make itself runs the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True, timeout=patience(60)
    )


def test_old_python_is_named_with_what_to_do(clone: Path) -> None:
    old = write_interpreter(clone / "python3.10", "3.10.13")
    result = run_make(clone, f"PYTHON={old}", "install")
    assert result.returncode != 0
    assert result.stderr.splitlines()[0] == (
        f"Emender needs Python 3.11 or newer. {old} is 3.10. Name a newer one: make PYTHON=python3.12"
    )
    assert (clone / ".venv/.installed").exists()


def test_current_venv_is_kept(clone: Path) -> None:
    assert "Nothing to be done" in run_make(clone, "install").stdout
    assert "Nothing to be done" in run_make(clone, f"PYTHON={sys.executable}", "install").stdout


def test_venv_is_made_again_for_another_interpreter(clone: Path) -> None:
    newer = write_interpreter(clone / "python3.99", "3.99.0")
    assert f"{newer} {REMAKE}" in run_make(clone, "-n", f"PYTHON={newer}", "install").stdout


def test_venv_is_made_again_when_its_interpreter_is_gone(clone: Path) -> None:
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to(clone / "gone")
    assert REMAKE in run_make(clone, "-n", "install").stdout


def test_changed_dependencies_are_installed_into_the_same_venv(clone: Path) -> None:
    (clone / ".venv/.installed").unlink()
    steps = run_make(clone, "-n", "install").stdout
    assert "pip install" in steps and REMAKE not in steps


def test_help_lists_every_target(clone: Path) -> None:
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY: demo"))
    listed = [line.split()[1] for line in run_make(clone, "help").stdout.splitlines()]
    assert sorted(listed) == sorted(phony.split()[1:])
