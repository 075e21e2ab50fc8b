"""Files of a checkpoint and their digests."""

import hashlib
import json
from pathlib import Path

from emender.errors import EmenderError

MANIFEST = "manifest.json"


def read_sha256(path: Path) -> str:
    """Compute the sha256 of a file: 64 lowercase hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(content: bytes) -> dict[str, str]:
    """Parse `manifest.json`: the sha256 of each file of the pipeline, by its path."""
    files: dict[str, str] = json.loads(content)["files"]
    for path in files:
        if path.startswith("/") or {"", ".", ".."} & set(path.split("/")) or "\\" in path or ":" in path:
            raise EmenderError(f"The manifest has the path {path!r}, which is outside the folder.")
    return files
