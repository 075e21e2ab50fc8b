"""What an installation puts where: imports beside a clone, typed packages, the image's installation."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import editing
import emender
from tests.patience import patience

ROOT = Path(__file__).parents[1]
CONTAINERFILE = ROOT / "deploy/Containerfile"


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=patience(250))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_script_beside_a_clone_named_emender_imports_the_client(tmp_path: Path) -> None:
    (tmp_path / "emender").symlink_to(ROOT)
    (tmp_path / "script.py").write_text("import emender\nprint(emender.Client.__name__, emender.__file__)\n")
    assert run(sys.executable, "script.py", cwd=tmp_path) == f"Client {ROOT}/client/src/emender/__init__.py"


@pytest.mark.parametrize("name", ["app", "demo", "editing", "migrations"])
def test_users_own_package_beside_a_script_does_not_break_the_client(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported by the client')\n")
    modules = "[import_module(m.name) for m in pkgutil.walk_packages(emender.__path__, 'emender.')]"
    script = (
        f"import pkgutil, emender\nfrom importlib import import_module\n{modules}\nprint(emender.Client.__name__)\n"
    )
    (tmp_path / "script.py").write_text(script)
    assert run(sys.executable, "script.py", cwd=tmp_path) == "Client"


@pytest.mark.parametrize("package", ["app", "client/src/emender", "demo", "editing"])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file() and (ROOT / package / "py.typed").is_file()


def test_client_and_service_have_the_version_that_the_changelog_describes() -> None:
    versions = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert emender.__version__ == editing.__version__ == versions[0]


@pytest.mark.clients
@pytest.mark.slow
def test_service_works_where_the_image_installs_it(tmp_path: Path) -> None:
    """Copy what the Containerfile copies, install it as the API's image does, and run commands elsewhere."""
    source, venv, elsewhere = tmp_path / "source", tmp_path / "venv", tmp_path / "elsewhere"
    text = CONTAINERFILE.read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text.partition("FROM source AS api-build")[0], re.MULTILINE):
        *paths, target = line.split()
        for path in paths:
            if (ROOT / path).is_dir():
                shutil.copytree(
                    ROOT / path, source / target, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
                )
            else:
                (source / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, source / target)
    (arguments,) = re.findall(r"pip --python /venv (install .* \./client \.)$", text, re.MULTILINE)
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    run(sys.executable, "-m", "pip", "--python", venv, *arguments.split(), cwd=source)
    shutil.rmtree(source)
    elsewhere.mkdir()
    for command in ("migrate", "serve", "worker"):
        assert f"emender {command}" in run(venv / "bin/emender", command, "--help", cwd=elsewhere)
    check = "import app.db.migrate as m; print(m.ROOT); print(*m.list_revisions())"
    root, revisions = run(venv / "bin/python", "-c", check, cwd=elsewhere).splitlines()
    assert Path(root).is_relative_to(venv)
    assert len(revisions.split()) == len(list((ROOT / "migrations/versions").glob("*.py")))
