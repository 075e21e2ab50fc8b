"""The examples run against a started service, and the notebook shows thumbnails."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.conftest import Reader
from tests.docs.pages import ROOT
from tests.patience import patience

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NOTEBOOK = ROOT / "examples/first_edit.ipynb"


def client_environment(reader: Reader) -> dict[str, str]:
    key = (reader.folder / "var/admin-key").read_text().strip()
    return reader.environment | {"EMENDER_URL": f"http://127.0.0.1:{reader.port}", "EMENDER_API_KEY": key}


def find_html(cell: Mapping[str, Any]) -> str:
    return "".join(output.get("data", {}).get("text/html", "") for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook_runs_and_shows_thumbnails(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in client_environment(reader).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=int(patience(240)), resources={"metadata": {"path": tmp_path}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (shown,) = [cell for cell in cells if '<img src="data:image/png;base64,' in find_html(cell)]
    assert shown.source.endswith("\npictures")
    assert (tmp_path / "first-edit/model_index.json").is_file()


@pytest.mark.slow
def test_batch_script_prints_the_checkpoint(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "edits.csv").write_text("source,destination\nrose,cactus\ncar,bicycle\n")
    environment = os.environ | client_environment(reader)
    register = [sys.executable, "-m", "app.cli.main", "models", "register", "batch-example", "pipeline", "--wait"]
    subprocess.run(register, cwd=ROOT, env=environment, check=True, capture_output=True)
    script: list[str | Path] = [
        sys.executable,
        ROOT / "examples/edit_batch.py",
        "batch-example",
        tmp_path / "edits.csv",
        "--alias",
        "new",
    ]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=patience(240))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("v1: 2 edits, commit ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_have_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []
