"""Virtual environments of the clients, made once from pinned requirements, without our code."""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NAMES = tuple(sorted(path.stem.removeprefix("requirements-") for path in FOLDER.glob("requirements-[0-9]*.txt")))
"""Versions of huggingface_hub."""
MODEL_SIGNING = "model-signing"


@dataclass(frozen=True)
class ClientEnvironment:
    name: str

    @property
    def requirements(self) -> Path:
        return FOLDER / f"requirements-{self.name}.txt"

    @property
    def folder(self) -> Path:
        """The folder, named by a hash of its requirements, so that changed ones make another."""
        made_of = f"{sys.version}\n{self.requirements.read_text()}"
        return ROOT / "out" / "clients" / f"{self.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"

    @property
    def bin(self) -> Path:
        """The folder of its programs. It is made with pip if missing, which needs a package index."""
        ready = self.folder / "ready"
        if not ready.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
            pip: list[str | Path] = [
                self.folder / "bin" / "python",
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
            ]
            subprocess.run([*pip, "--no-deps", "-r", self.requirements], check=True)
            if self.name in NAMES:
                self._lend_torch()
            ready.touch()
        return self.folder / "bin"

    def _lend_torch(self) -> None:
        """Link to our torch: it is by far the largest package, and every client accepts it."""
        ours = Path(torch.__file__).parents[1]
        (theirs,) = self.folder.glob("lib/python*/site-packages")
        for pattern in ("torch", "torchgen", "functorch", "torch-*.dist-info"):
            for part in ours.glob(pattern):
                (theirs / part.name).symlink_to(part)
