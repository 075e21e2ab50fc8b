"""Blobs in an S3 bucket, through obstore. Fetched blobs are cached in a local folder."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket

from app.storage.local import LocalStore
from app.storage.store import (
    CHUNK,
    QUARANTINE,
    Blob,
    BlobCorrupt,
    BlobMissing,
    Store,
    StoreUnavailable,
    blob_key,
    is_blob_key,
    read_chunks,
)
from editing.files import hash_file

if TYPE_CHECKING:
    from obstore.store import S3Config

PART = 8 << 20  # bytes of a part of an upload; S3 takes at least 5 MiB and at most 10,000 parts
PRESIGNED_URL_LIFETIME = timedelta(hours=1)
IN_USE_SECONDS = 3600.0  # a cached blob used since then is kept: a caller may be about to open it


class S3Store(Store):
    """Content-addressed blobs as objects `<prefix>/<first two digits>/<sha256>`.

    `folder` caches up to about `cache_bytes` of fetched blobs. Clients get presigned URLs for blobs of at least
    `presigned_min_bytes` bytes; None: never. Without keys in `config`, credentials are found as AWS's own tools do:
    AWS_ACCESS_KEY_ID and the like, a web identity, the machine's role.
    """

    def __init__(
        self,
        url: str,
        *,
        folder: Path,
        config: "S3Config",
        presigned_min_bytes: int | None = None,
        cache_bytes: int = 50 << 30,
    ) -> None:
        parts = urlsplit(url)
        self._bucket = Bucket(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            client_options={"allow_http": True, "connect_timeout": "5s", "timeout": "300s"},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)},
            config=config,
        )
        self.local = LocalStore(folder)
        self.folder = self.local.folder
        self.presigned_min_bytes = presigned_min_bytes
        self.cache_bytes = cache_bytes

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        with _translate_errors(sha256):
            obstore.put(self._bucket, blob_key(sha256), content, chunk_size=PART)
        return sha256

    def put_file(self, path: Path) -> str:
        sha256 = hash_file(path)
        with path.open("rb") as file, _translate_errors(sha256):
            chunks = _verify(read_chunks(file), sha256)
            content = chunks if path.stat().st_size > PART else b"".join(chunks)
            obstore.put(self._bucket, blob_key(sha256), content, chunk_size=PART)
        return sha256

    def stat(self, sha256: str) -> Blob:
        with _translate_errors(sha256):
            found = obstore.head(self._bucket, blob_key(sha256))
        return Blob(sha256, found["size"], found["last_modified"])

    def read(self, sha256: str) -> bytes:
        return b"".join(_verify(self._stream(sha256), sha256))

    def fetch(self, sha256: str, *, recheck: bool = True) -> Path:
        path = self.local.path(sha256)
        _mark_used(path)
        try:
            self.local.fetch(sha256, recheck=recheck)
        except (BlobMissing, BlobCorrupt):
            self._evict()
            self.local.write(self._stream(sha256), expected=sha256)
        return path

    def verify(self, sha256: str) -> None:
        for _ in _verify(self._stream(sha256), sha256):
            pass

    def presigned_url(self, sha256: str, *, size: int) -> str | None:
        if self.presigned_min_bytes is None or size < self.presigned_min_bytes:
            return None
        with _translate_errors(sha256):
            return obstore.sign(self._bucket, "GET", blob_key(sha256), PRESIGNED_URL_LIFETIME)

    def list_blobs(self) -> Iterator[Blob]:
        with _translate_errors():
            for page in obstore.list(self._bucket, chunk_size=1000):
                for found in page:
                    folder, _, name = found["path"].partition("/")
                    if is_blob_key(folder, name):
                        yield Blob(name, found["size"], found["last_modified"])

    def delete(self, sha256: str) -> None:
        with _translate_errors(sha256):
            obstore.delete(self._bucket, blob_key(sha256))
        self.local.delete(sha256)

    def quarantine(self, sha256: str) -> None:
        with _translate_errors(sha256):
            obstore.rename(self._bucket, blob_key(sha256), f"{QUARANTINE}/{sha256}")

    def remove_temporary_files(self, *, before: datetime) -> int:
        """Delete local files only. A lifecycle rule of the bucket deletes the parts of interrupted uploads."""
        return self.local.remove_temporary_files(before=before)

    def probe(self) -> None:
        self.local.probe()
        super().probe()

    def _stream(self, sha256: str) -> Iterator[bytes]:
        with _translate_errors(sha256):
            found = obstore.get(self._bucket, blob_key(sha256))
            yield from map(bytes, found.stream(min_chunk_size=CHUNK))

    def _evict(self) -> None:
        """Delete the least recently used cached blobs until `cache_bytes` are left."""
        cached = []
        for blob in self.local.list_blobs():
            try:
                cached.append((self.local.path(blob.sha256).stat().st_atime, blob))
            except FileNotFoundError:
                continue  # evicted by another process
        total = sum(blob.size for _, blob in cached)
        for used_at, blob in sorted(cached, key=lambda pair: pair[0]):
            if total <= self.cache_bytes or time.time() - used_at < IN_USE_SECONDS:
                break
            self.local.delete(blob.sha256)
            total -= blob.size


def _mark_used(path: Path) -> None:
    """Set the access time of a cached file, which the mount may not do.

    Rarely, and before the file is checked: a recent check is valid only until the file's times change.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if time.time() - found.st_atime > IN_USE_SECONDS / 4:
        os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))


def _verify(chunks: Iterable[bytes], sha256: str) -> Iterator[bytes]:
    """Yield the chunks. Raises `BlobCorrupt` at their end if they do not match the sha256."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != sha256:
        raise BlobCorrupt(sha256)


@contextmanager
def _translate_errors(sha256: str = "") -> Iterator[None]:
    """Raise obstore's errors as `BlobMissing` and `StoreUnavailable`."""
    try:
        yield
    except FileNotFoundError:
        raise BlobMissing(sha256) from None
    except BaseError as error:
        raise StoreUnavailable(0, f"the request to the store failed ({type(error).__name__})") from error
