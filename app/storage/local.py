"""Blobs by sha256 in a folder: written to a temporary name, fsynced, renamed; verified when read."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobMissing(Exception):
    """No blob of that sha256 is in the store."""


class BlobCorrupt(Exception):
    """What lies under a sha256 has another: a flipped bit, a cut file. It is refused, never served."""


class LocalStore:
    """Content-addressed blobs under `folder`: `<first two digits>/<sha256>`, never changed once there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def cache(self, name: str) -> Path:
        """A folder beside the blobs for what can be computed again from them; anyone may empty it."""
        return self.folder / name

    def put(self, content: bytes) -> str:
        """Store bytes; returns their sha256 (64 lowercase hex digits)."""
        with self.writing() as file:
            file.write(content)
        return file.sha256

    def put_file(self, path: Path) -> str:
        """Store a file of this machine, streamed; returns its sha256."""
        with path.open("rb") as source, self.writing() as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
        return file.sha256

    @contextmanager
    def writing(self) -> Iterator["HashingFile"]:
        """A file to write into; once the block ends it is in the store under its `sha256`.

        If the block raises, nothing is stored and the temporary file is gone.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix="incoming-")
        try:
            with os.fdopen(descriptor, "wb") as raw:
                file = HashingFile(raw)
                yield file
                raw.flush()
                os.fsync(raw.fileno())
            target = self.path(file.sha256)
            target.parent.mkdir(exist_ok=True)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
            _fsync_folder(target.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def path(self, sha256: str) -> Path:
        """Where a blob lies. Takes 64 hex digits and nothing else, so no name of a client's becomes a path."""
        if not SHA256.fullmatch(sha256):
            raise BlobMissing(sha256)
        return self.folder / sha256[:2] / sha256

    def size(self, sha256: str) -> int:
        """Bytes of a blob; raises `BlobMissing`."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            raise BlobMissing(sha256) from None

    def read(self, sha256: str) -> bytes:
        """The whole blob, verified: raises `BlobMissing` or `BlobCorrupt`."""
        try:
            content = self.path(sha256).read_bytes()
        except FileNotFoundError:
            raise BlobMissing(sha256) from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise BlobCorrupt(sha256)
        return content

    def verified(self, sha256: str) -> Path:
        """The blob's path after its bytes were checked against the sha256; raises `BlobMissing` or `BlobCorrupt`."""
        path = self.path(sha256)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise BlobMissing(sha256) from None
        if digest != sha256:
            raise BlobCorrupt(sha256)
        return path

    def __contains__(self, sha256: str) -> bool:
        return bool(SHA256.fullmatch(sha256)) and self.path(sha256).is_file()


class HashingFile:
    """Writes through to a file and hashes on the way."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self._hash.update(content)
        return self._raw.write(content)

    @property
    def sha256(self) -> str:
        """Of what was written so far, 64 lowercase hex digits."""
        return self._hash.hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
