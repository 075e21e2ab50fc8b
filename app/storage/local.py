"""Blobs by sha256 in a folder: written to a temporary name, fsynced, renamed; verified when read."""

import errno
import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from app.storage.store import (
    CHUNK,
    PROBE,
    SHA256,
    Blob,
    BlobCorrupt,
    BlobMissing,
    HashingFile,
    StoreUnavailable,
    key_of,
)

INCOMING = "incoming-"
QUARANTINE = "quarantine"
RECENT_SECONDS = 600.0
REMEMBERED = 1024  # checks; one is a few hundred bytes


class LocalStore:
    """Content-addressed blobs under `folder`: `<first two digits>/<sha256>`, never changed once there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._checked: OrderedDict[str, tuple[tuple[int, int, int, int], float]] = OrderedDict()
        self._checking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by the first two digits

    def cache_folder(self, name: str) -> Path:
        return self.folder / name

    def put(self, content: bytes) -> str:
        with self.open_writer() as file:
            file.write(content)
        return file.sha256

    def put_file(self, path: Path) -> str:
        with path.open("rb") as source, self.open_writer() as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
        return file.sha256

    @contextmanager
    def open_writer(self) -> Iterator[HashingFile]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=INCOMING)
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
        return self.folder / key_of(sha256)

    def size(self, sha256: str) -> int:
        return self._stat(sha256).st_size

    def stored_at(self, sha256: str) -> datetime:
        return datetime.fromtimestamp(self._stat(sha256).st_mtime, UTC)

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
        elif not self._was_checked(sha256):
            with self._checking[path.parent.name]:  # many that ask at once wait for one check
                if not self._was_checked(sha256):
                    self.verify(sha256)
        return path

    def verify(self, sha256: str) -> None:
        try:
            with self.path(sha256).open("rb") as file:
                state = _state(os.fstat(file.fileno()))  # before it is read: a write meanwhile shows as a change
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise BlobMissing(sha256) from None
        if digest != sha256:
            raise BlobCorrupt(sha256)
        self._checked[sha256] = (state, time.monotonic())
        self._checked.move_to_end(sha256)
        while len(self._checked) > REMEMBERED:
            self._checked.popitem(last=False)

    def signed_url(self, sha256: str, *, size: int) -> str | None:  # noqa: ARG002
        return None

    def list_blobs(self) -> Iterator[Blob]:
        for path in self.folder.glob("??/*"):
            if SHA256.fullmatch(path.name) and path.parent.name == path.name[:2]:
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue  # deleted meanwhile
                yield Blob(path.name, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

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
        for path in self.folder.glob(f"{INCOMING}*"):
            try:
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()
                    count += 1
            except FileNotFoundError:
                continue  # it became a blob meanwhile
        return count

    def probe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=INCOMING) as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
            if Path(file.name).read_bytes() != PROBE:
                raise StoreUnavailable(errno.EIO, "what is written is not what is read", str(self.folder))

    def _stat(self, sha256: str) -> os.stat_result:
        try:
            return self.path(sha256).stat()
        except FileNotFoundError:
            raise BlobMissing(sha256) from None

    def _was_checked(self, sha256: str) -> bool:
        state, at = self._checked.get(sha256, (None, 0.0))
        return state == _state(self._stat(sha256)) and time.monotonic() - at < RECENT_SECONDS

    def __contains__(self, sha256: str) -> bool:
        return bool(SHA256.fullmatch(sha256)) and self.path(sha256).is_file()


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    """Two equal ones: nothing has written to the file between them. The ctime cannot be set back by a program."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
