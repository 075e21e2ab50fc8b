"""A reader of the documentation: a checkout to work in, and beside it the service that `make serve` starts."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block
from tests.patience import patience
from tests.postgres import server_folder
from tests.servers import free_port

PRIVATE = (".git", ".venv", "out", "var")  # a reader has their own
SHIMS = {
    "python": f'exec "{sys.executable}" "$@"',
    "emender": f'exec "{sys.executable}" -m app.cli.main "$@"',
    "pytest": f'exec "{sys.executable}" -m pytest "$@"',
    "hf": f'exec "{Path(sys.executable).parent / "hf"}" "$@"',
    "model_signing": f'exec "{Path(sys.executable).parent / "model_signing"}" "$@"',
}
PATIENCE = 240  # seconds for a page


@dataclass
class Reader:
    """Does what a page says, in a shell in the checkout."""

    folder: Path
    environment: dict[str, str]
    port: int
    receiver_port: int = field(default_factory=free_port)

    def read(self, blocks: list[Block]) -> dict[Block, str]:
        """Run the blocks in one shell; what each printed. Fails where one does."""
        notes = self.folder / "notes"
        notes.mkdir(exist_ok=True)
        script = ["set -euo pipefail"]
        for number, block in enumerate(blocks):
            text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
            for address in ("127.0.0.1:9000", '"127.0.0.1", 9000'):
                text = text.replace(address, address.replace("9000", str(self.receiver_port)))
            if block.file:
                file = self.folder / block.file
                file.parent.mkdir(exist_ok=True)
                file.write_text(text, encoding="utf-8")
                continue
            if block.language == "python":
                (notes / f"{number}.py").write_text(text, encoding="utf-8")
                text = f"python notes/{number}.py\n"
            script.append(f"echo {number} > notes/at; exec > notes/{number}.out\n{text}")
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=patience(PATIENCE),
        )
        at = int((notes / "at").read_text())
        printed = (notes / f"{at}.out").read_text()
        assert done.returncode == 0, f"{blocks[at]} ended with {done.returncode}\n{printed}\n{done.stderr[-3000:]}"
        return {block: (notes / f"{n}.out").read_text() for n, block in enumerate(blocks) if not block.file}


@pytest.fixture(scope="session")
def checkout() -> Iterator[Path]:
    """A folder that the user of the embedded Postgres can enter."""
    with server_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def reader(checkout: Path) -> Iterator[Reader]:
    folder = checkout
    for entry in ROOT.iterdir():
        if entry.name not in PRIVATE:
            (folder / entry.name).symlink_to(entry)
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, line in SHIMS.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    (commands / "activate").write_text(f'PATH="{commands}:$PATH"\n')

    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EMENDER_", "HF_"))}
    environment |= {
        "EMENDER_PORT": str(port),
        "EMENDER_MODEL_ROOTS": str(ROOT / "demo" / "weights"),
        "EMENDER_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
        "EMENDER_POLL_INTERVAL_SECONDS": "0.2",
        "HF_HOME": str(folder / "hub"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "serve.log").open("wb") as log:
        command = [str(commands / "emender"), "serve", "--embedded"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode()
        assert f"http://127.0.0.1:{port}" in line, (folder / "serve.log").read_text()
        yield Reader(folder, environment, port)
    finally:
        process.terminate()
        # It prints that it stops, which would be an error on a pipe that is closed
        process.communicate(timeout=patience(30))
        assert process.returncode == 0
