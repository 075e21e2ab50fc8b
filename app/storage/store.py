"""The interface of a content-addressed store, and its errors. `local` keeps blobs in a folder, `s3` in a bucket."""

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

CHUNK = 1 << 20
QUARANTINE = "quarantine"
SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobMissing(Exception):
    """The store has no blob of this sha256."""


class BlobCorrupt(Exception):
    """The bytes of a blob do not match its sha256, after a flipped bit or a cut file. They are never served."""


class StoreUnavailable(OSError):
    """The store cannot be reached or denies access; `strerror` says why."""


@dataclass(frozen=True)
class Blob:
    """What the store knows of a blob without reading it."""

    sha256: str
    size: int
    stored_at: datetime
    """When the bytes were last put, by the store's clock; aware UTC."""


class Store(Protocol):
    """Content-addressed blobs. A blob never changes, and appears whole or not at all.

    A sha256 is 64 lowercase hex digits. Anything else raises `BlobMissing`: no client's string becomes a path or key.
    Every method that reads may raise `BlobMissing`, and `StoreUnavailable` if the store is on another machine.
    """

    folder: Path
    """On this machine. Other data below it can be recomputed from the blobs, and may be deleted at any time."""

    def put(self, content: bytes) -> str:
        """Store bytes and return their sha256. Bytes that are stored already are written again, and count as new."""

    def put_file(self, path: Path) -> str:
        """Store a local file, read in chunks, and return its sha256."""

    def stat(self, sha256: str) -> Blob:
        """Return size and time of a blob without reading it."""

    def read(self, sha256: str) -> bytes:
        """Return the verified bytes of a blob. Raises `BlobCorrupt`."""

    def fetch(self, sha256: str, *, recheck: bool = True) -> Path:
        """Return a local file with the verified bytes of a blob. Raises `BlobCorrupt`.

        `recheck=False` accepts a check that this process made in the last minutes, if size, times and inode of the
        file have not changed since.
        """

    def verify(self, sha256: str) -> None:
        """Read the blob from the store and compare its sha256. Raises `BlobCorrupt`."""

    def presigned_url(self, sha256: str, *, size: int) -> str | None:  # noqa: ARG002
        """Return a URL that gives a client the blob for a limited time; None if the service sends it itself."""
        return None

    def list_blobs(self) -> Iterator[Blob]:
        """Yield all blobs in any order, also damaged ones. Reads none of them."""

    def delete(self, sha256: str) -> None:
        """Delete a blob. Does nothing if there is none."""

    def quarantine(self, sha256: str) -> None:
        """Move a damaged blob aside, so that the bytes can be put again."""

    def remove_temporary_files(self, *, before: datetime) -> int:
        """Delete the files that interrupted writes left before this time. Returns their number."""

    def probe(self) -> None:
        """Write, read and delete a small blob. Raises `OSError` if that fails."""
        sha256 = self.put(uuid4().bytes)
        try:
            self.read(sha256)
        except (BlobMissing, BlobCorrupt):
            raise StoreUnavailable(errno.EIO, "the bytes read differ from the bytes written") from None
        self.delete(sha256)

    def __contains__(self, sha256: str) -> bool:
        try:
            self.stat(sha256)
        except BlobMissing:
            return False
        return True


def blob_key(sha256: str) -> str:
    """Return `<first two digits>/<sha256>`. Raises `BlobMissing` for anything but 64 lowercase hex digits."""
    if not SHA256.fullmatch(sha256):
        raise BlobMissing(sha256)
    return f"{sha256[:2]}/{sha256}"


def is_blob_key(folder: str, name: str) -> bool:
    return SHA256.fullmatch(name) is not None and folder == name[:2]


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    return iter(partial(file.read, CHUNK), b"")
