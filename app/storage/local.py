"""Blobs in a folder: written to a temporary file, fsynced, renamed; verified when read."""

import hashlib
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from app.storage.store import (
    QUARANTINE,
    Blob,
    BlobCorrupt,
    BlobMissing,
    Store,
    blob_key,
    is_blob_key,
    read_chunks,
)
from editing.files import hash_file

TEMPORARY = "incoming-"
RECENT_SECONDS = 600.0
RECENT_CHECKS = 1024

FileState = tuple[int, int, int, int]


class LocalStore(Store):
    """Content-addressed blobs as files `<folder>/<first two digits>/<sha256>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._verify_once = lru_cache(RECENT_CHECKS)(self._verify_state)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by the first digits

    def put(self, content: bytes) -> str:
        return self.write([content])

    def put_file(self, path: Path) -> str:
        with path.open("rb") as file:
            return self.write(read_chunks(file))

    def write(self, chunks: Iterable[bytes], *, expected: str | None = None) -> str:
        """Store the concatenated chunks and return their sha256. Raises `BlobCorrupt` if it is not `expected`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=TEMPORARY)
        digest = hashlib.sha256()
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            sha256 = digest.hexdigest()
            if expected not in (None, sha256):
                raise BlobCorrupt(expected)
            target = self.path(sha256)
            target.parent.mkdir(exist_ok=True)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
            _fsync_folder(target.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return sha256

    def path(self, sha256: str) -> Path:
        """Return the path of a blob, whether or not it exists."""
        return self.folder / blob_key(sha256)

    def stat(self, sha256: str) -> Blob:
        return _describe(sha256, self._stat(sha256))

    def read(self, sha256: str) -> bytes:
        try:
            content = self.path(sha256).read_bytes()
        except FileNotFoundError:
            raise BlobMissing(sha256) from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise BlobCorrupt(sha256)
        return content

    def fetch(self, sha256: str, *, recheck: bool = True) -> Path:
        path = self.path(sha256)
        if recheck:
            self.verify(sha256)
        else:
            with self._locks[sha256[:4]]:  # concurrent requests wait for one check
                self._verify_once(sha256, _state(self._stat(sha256)), int(time.monotonic() / RECENT_SECONDS))
        return path

    def verify(self, sha256: str) -> None:
        try:
            if hash_file(self.path(sha256)) != sha256:
                raise BlobCorrupt(sha256)
        except FileNotFoundError:
            raise BlobMissing(sha256) from None

    def list_blobs(self) -> Iterator[Blob]:
        for path in self.folder.glob("??/*"):
            if is_blob_key(path.parent.name, path.name):
                try:
                    yield _describe(path.name, path.stat())
                except FileNotFoundError:
                    continue  # deleted in the meantime

    def delete(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def quarantine(self, sha256: str) -> None:
        (self.folder / QUARANTINE).mkdir(parents=True, exist_ok=True)
        try:
            os.replace(self.path(sha256), self.folder / QUARANTINE / sha256)
        except FileNotFoundError:
            raise BlobMissing(sha256) from None

    def remove_temporary_files(self, *, before: datetime) -> int:
        count = 0
        for path in self.folder.glob(f"{TEMPORARY}*"):
            try:
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()
                    count += 1
            except FileNotFoundError:
                continue  # renamed to a blob in the meantime
        return count

    def _stat(self, sha256: str) -> os.stat_result:
        try:
            return self.path(sha256).stat()
        except FileNotFoundError:
            raise BlobMissing(sha256) from None

    def _verify_state(self, sha256: str, state: FileState, period: int) -> None:  # noqa: ARG002
        """Verify a blob; the cache around this method repeats it for another state of the file or another period."""
        self.verify(sha256)


def _describe(sha256: str, stat: os.stat_result) -> Blob:
    return Blob(sha256, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))


def _state(stat: os.stat_result) -> FileState:
    """Return what changes with every write to the file. A program cannot set the ctime back."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
