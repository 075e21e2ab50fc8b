"""A file with its digest, and files that are replaced atomically."""

import codecs
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class File:
    """A file of a model, a checkpoint or an evaluation."""

    path: str
    """Relative to the folder it belongs to, with forward slashes."""
    sha256: str
    """Of its content: 64 lowercase hex digits."""
    size: int
    """Bytes."""

    @classmethod
    def read(cls, path: Path, *, folder: Path) -> "File":
        """Describe a file below `folder`."""
        return cls(path.relative_to(folder).as_posix(), hash_file(path), path.stat().st_size)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as 64 lowercase hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, without the byte-order mark of a text."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """Yield a folder whose JSON files begin with no byte-order mark, which libraries refuse.

    It is `folder` itself, or a temporary folder of links to its files.
    """
    marked = [path for path in sorted(folder.rglob("*.json")) if path.is_file() and _has_mark(path)]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="emender-") as temporary:
        target = Path(temporary) / folder.name
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                link = target / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.write_bytes(read_bytes(path)) if path in marked else link.symlink_to(path.absolute())
        yield target


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def read_safetensors_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where the tensors start."""
    start = 8 + int.from_bytes(file.read(8), "little")
    return json.loads(file.read(start - 8)), start


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` at the end.

    Readers see the old content or the new content, never a part. An error removes the temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of a file; readers never see a part of it."""
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content)
