"""Write `emender/_sync` from `emender/_async`: `make sync-client`. A test checks that it is up to date."""

import subprocess
import sys
from pathlib import Path

import unasync

HEADER = "# Written by client/generate_sync.py from emender/_async. Do not edit.\n"
PACKAGE = Path(__file__).parent / "src/emender"
REPLACEMENTS = {
    "_async": "_sync",
    "AsyncBaseTransport": "BaseTransport",
    "AsyncClient": "Client",
    "aclose": "close",
    "aiter_bytes": "iter_bytes",
    "aiter_lines": "iter_lines",
    "aread": "read",
    "asyncio": "time",
}


def generate(target: Path) -> None:
    """Write the sync modules into a folder."""
    sources = [str(path) for path in sorted((PACKAGE / "_async").glob("*.py"))]
    rule = unasync.Rule(str(PACKAGE / "_async"), str(target), additional_replacements=REPLACEMENTS)
    unasync.unasync_files(sources, [rule])
    for path in target.glob("*.py"):
        path.write_text(HEADER + path.read_text())
    config = ("--config", str(PACKAGE.parents[2] / "pyproject.toml"))
    for command in (("check", "--select", "I", "--fix-only"), ("format",)):
        subprocess.run([sys.executable, "-m", "ruff", *command, "--quiet", *config, str(target)], check=True)


if __name__ == "__main__":
    generate(PACKAGE / "_sync")
