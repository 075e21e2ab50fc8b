"""What the service asks of its store: blobs by sha256, in a folder (`local`) or in a bucket (`s3`)."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

CHUNK = 1 << 20
PROBE = b"emender"
SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobMissing(Exception):
    """No blob of that sha256 is in the store."""


class BlobCorrupt(Exception):
    """What lies under a sha256 has another: a flipped bit, a cut file. It is refused, never served."""


class StoreUnavailable(OSError):
    """The store cannot be reached, or it refuses us; `strerror` says why."""


@dataclass(frozen=True)
class Blob:
    """What the store says of a blob without reading it."""

    sha256: str
    size: int
    stored_at: datetime
    """When these bytes were last put, by the store's clock; aware UTC."""


class Store(Protocol):
    """Content-addressed blobs, never changed once there; each appears whole or not at all.

    A sha256 is 64 lowercase hex digits; anything else is `BlobMissing`, so that no client's string becomes a path or a
    key. All that reads may raise `BlobMissing`, and `StoreUnavailable` where the store is on another machine.
    """

    def cache_folder(self, name: str) -> Path:
        """A folder of this machine for what can be computed again from the blobs; anyone may empty it."""

    def put(self, content: bytes) -> str:
        """Store bytes; returns their sha256. What is there already is written again, and so counts as new."""

    def put_file(self, path: Path) -> str:
        """The same for a file of this machine, read in pieces."""

    def open_writer(self) -> AbstractContextManager["HashingFile"]:
        """A file to write into; once the block ends it is in the store under its `sha256`.

        If the block raises, nothing is stored and the temporary file is gone.
        """

    def size(self, sha256: str) -> int:
        """Bytes of a blob."""

    def stored_at(self, sha256: str) -> datetime:
        """When a blob was last put, by the store's clock."""

    def read(self, sha256: str) -> bytes:
        """The whole blob, verified: raises `BlobCorrupt`."""

    def fetch(self, sha256: str, *, recheck: bool = True) -> Path:
        """A file of this machine with the blob's bytes, checked against the sha256; raises `BlobCorrupt`.

        With `recently` a check is good enough which this process made within the last minutes, of a file whose size,
        times and inode have not changed since.
        """

    def verify(self, sha256: str) -> None:
        """Read the blob where the store keeps it, and keep nothing of it; raises `BlobCorrupt`."""

    def signed_url(self, sha256: str, *, size: int) -> str | None:
        """Where a client that has no key of the store gets the blob for some time; None where we send it ourselves."""

    def list_blobs(self) -> Iterator[Blob]:
        """All that there are, in any order. Also damaged ones; nothing is read."""

    def delete(self, sha256: str) -> None:
        """Remove a blob; does nothing where there is none."""

    def quarantine(self, sha256: str) -> None:
        """Move a damaged blob out of the way, so that the bytes can be put again."""

    def remove_temporary_files(self, *, before: datetime) -> int:
        """Remove what writes that died left behind before then; returns how many files."""

    def probe(self) -> None:
        """Write a few bytes, read them and delete them again; raises `OSError` where that cannot be done."""

    def __contains__(self, sha256: str) -> bool: ...


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


def key_of(sha256: str) -> str:
    """`<first two digits>/<sha256>`. Takes 64 hex digits and nothing else; raises `BlobMissing`."""
    if not SHA256.fullmatch(sha256):
        raise BlobMissing(sha256)
    return f"{sha256[:2]}/{sha256}"
