"""What the README says, done as it says it: its commands exist, its shell walk-through runs against a real server."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_port

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = ROOT / "demo" / "weights"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_make_knows_the_commands() -> None:
    for target in re.findall(r"`?make (\w+)`?", README):
        known = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert known.returncode in (0, 1), known.stderr  # 2: no rule for it
        assert "No rule to make target" not in known.stderr


def test_linked_files_are_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """`emender serve --embedded` as `make serve` runs it; gives the environment of a shell beside it."""
    tmp_path.chmod(0o711)
    folder = tmp_path / "var"
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    environment |= {
        "EMENDER_FOLDER": str(folder),
        "EMENDER_PORT": str(port),
        "EMENDER_MODEL_ROOTS": str(WEIGHTS),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
    }
    with (tmp_path / "serve.log").open("wb") as log:
        command = ["emender", "serve", "--embedded"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode()
        assert f"http://127.0.0.1:{port}" in line, (tmp_path / "serve.log").read_text()
        yield environment | {"PORT": str(port), "FOLDER": str(folder)}
    finally:
        process.terminate()
        process.communicate(timeout=30)  # it says that it stops: to a pipe closed before, that would be an error
        assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_walk_through(server: dict[str, str], tmp_path: Path) -> None:
    """The shell blocks after `make serve`, in one shell one after the other, then the Python block beside them."""
    (correct, pull, deploy) = [block for block in blocks("sh") if "EMENDER_URL" in block]
    script = "set -euo pipefail\n" + correct + pull + deploy
    script = script.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server['PORT']}")
    script = script.replace("var/admin-key", f"{server['FOLDER']}/admin-key").replace(".venv/bin/", "")
    script = script.replace("deploy/pull.py", str(ROOT / "deploy" / "pull.py"))
    (snippet,) = [block for block in blocks("python") if "from_pretrained" in block and "load_pipeline" not in block]
    script += f"python - <<'END'\n{snippet}\nprint(type(text_encoder).__name__)\nEND\n"
    environment = server | {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("CLIPTextModel")
    assert (tmp_path / "out" / "pulled" / "text_encoder" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "pulled" / "unet").is_dir()
    assert "files as they were published, signed by" in done.stdout
    assert (tmp_path / "out" / "models" / "current" / "unet").is_dir()
