"""Blobs by sha256 in a bucket that speaks S3, through obstore; what was fetched is kept in a folder beside."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket
from pydantic import SecretStr

from app.storage.local import LocalStore
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

if TYPE_CHECKING:
    from obstore.store import S3Config

PART = 8 << 20  # bytes of a part of an upload; S3 takes at least 5 MiB and at most 10,000 parts
QUARANTINE = "quarantine"
SIGNED_SECONDS = 3600.0
KEPT_SECONDS = 3600.0  # a fetched blob used since then is not dropped: something may be about to open it


class S3Store:
    """Content-addressed blobs under `<prefix>/<first two digits>/<sha256>`; an object shows once its upload is whole.

    `folder` keeps what was fetched, up to about `cache_bytes`. Blobs of `signed_from` bytes and more are given to
    clients by a signed URL; None: we send all. Credentials that are not given are found as AWS's tools find them:
    AWS_ACCESS_KEY_ID and its like, a web identity, the machine's role.
    """

    def __init__(
        self,
        url: str,
        *,
        folder: Path,
        endpoint: str | None = None,
        region: str | None = None,
        access_key_id: SecretStr | None = None,
        secret_access_key: SecretStr | None = None,
        signed_from: int | None = None,
        cache_bytes: int = 50 << 30,
    ) -> None:
        parts = urlsplit(url)
        given: S3Config = {}
        if endpoint is not None:
            given["endpoint"] = endpoint
        if region is not None:
            given["region"] = region
        if access_key_id is not None and secret_access_key is not None:
            given["access_key_id"] = access_key_id.get_secret_value()
            given["secret_access_key"] = secret_access_key.get_secret_value()
        self._bucket = Bucket(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            client_options={"allow_http": True, "connect_timeout": "5s", "timeout": "300s"},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)},
            config=given,
        )
        self.local = LocalStore(folder)
        self.signed_from = signed_from
        self.cache_bytes = cache_bytes

    def cache_folder(self, name: str) -> Path:
        return self.local.cache_folder(name)

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        with _asking(sha256):
            obstore.put(self._bucket, key_of(sha256), content, use_multipart=len(content) > PART, chunk_size=PART)
        return sha256

    def put_file(self, path: Path) -> str:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            with _asking(sha256):
                if size <= PART:
                    obstore.put(self._bucket, key_of(sha256), b"".join(_checked(_chunks(file.read), sha256)))
                else:
                    parts = _checked(_chunks(file.read), sha256)
                    obstore.put(self._bucket, key_of(sha256), parts, use_multipart=True, chunk_size=PART)
        return sha256

    @contextmanager
    def open_writer(self) -> Iterator[HashingFile]:
        with self.local.open_writer() as file:
            yield file
        self.put_file(self.local.path(file.sha256))

    def size(self, sha256: str) -> int:
        return self._head(sha256)["size"]

    def stored_at(self, sha256: str) -> datetime:
        return self._head(sha256)["last_modified"]

    def read(self, sha256: str) -> bytes:
        return b"".join(self._stream(sha256))

    def fetch(self, sha256: str, *, recheck: bool = True) -> Path:
        path = self.local.path(sha256)
        _use(path)
        try:
            self.local.fetch(sha256, recheck=recheck)
        except (BlobMissing, BlobCorrupt):
            self._make_room()
            with self.local.open_writer() as file:
                for chunk in self._pieces(sha256):
                    file.write(chunk)
                if file.sha256 != sha256:
                    raise BlobCorrupt(sha256) from None
        return path

    def verify(self, sha256: str) -> None:
        for _ in self._stream(sha256):
            pass

    def signed_url(self, sha256: str, *, size: int) -> str | None:
        if self.signed_from is None or size < self.signed_from:
            return None
        with _asking(sha256):
            return obstore.sign(self._bucket, "GET", key_of(sha256), timedelta(seconds=SIGNED_SECONDS))

    def list_blobs(self) -> Iterator[Blob]:
        with _asking(""):
            for page in obstore.list(self._bucket, chunk_size=1000):
                for found in page:
                    folder, _, name = found["path"].partition("/")
                    if SHA256.fullmatch(name) and folder == name[:2]:
                        yield Blob(name, found["size"], found["last_modified"])

    def delete(self, sha256: str) -> None:
        with _asking(sha256):
            obstore.delete(self._bucket, key_of(sha256))
        self.local.delete(sha256)

    def quarantine(self, sha256: str) -> None:
        with _asking(sha256):
            obstore.rename(self._bucket, key_of(sha256), f"{QUARANTINE}/{sha256}")

    def remove_temporary_files(self, *, before: datetime) -> int:
        """Of this machine's folder. Parts of uploads that died are the bucket's to forget, by a lifecycle rule."""
        return self.local.remove_temporary_files(before=before)

    def probe(self) -> None:
        self.local.probe()
        name = f"probes/{uuid4().hex}"
        try:
            with _asking(name):
                obstore.put(self._bucket, name, PROBE)
                found = bytes(obstore.get(self._bucket, name).bytes())
                obstore.delete(self._bucket, name)
        except BlobMissing:
            found = b""
        if found != PROBE:
            raise StoreUnavailable(0, "what is written is not what is read")

    def _head(self, sha256: str) -> "obstore.ObjectMeta":
        with _asking(sha256):
            return obstore.head(self._bucket, key_of(sha256))

    def _stream(self, sha256: str) -> Iterator[bytes]:
        """The blob in pieces; the last is followed by `BlobCorrupt` where they are not what the sha256 says."""
        return _checked(self._pieces(sha256), sha256)

    def _pieces(self, sha256: str) -> Iterator[bytes]:
        with _asking(sha256):
            found = obstore.get(self._bucket, key_of(sha256))
            yield from map(bytes, found.stream(min_chunk_size=CHUNK))

    def _make_room(self) -> None:
        """Drop what was fetched and has not been used for longest, down to `cache_bytes`."""
        kept = []
        for blob in self.local.list_blobs():
            try:
                kept.append((self.local.path(blob.sha256).stat().st_atime, blob))
            except FileNotFoundError:
                continue
        total = sum(blob.size for _, blob in kept)
        for used, blob in sorted(kept, key=lambda pair: pair[0]):
            if total <= self.cache_bytes or time.time() - used < KEPT_SECONDS:
                break
            self.local.delete(blob.sha256)
            total -= blob.size

    def __contains__(self, sha256: str) -> bool:
        try:
            self.size(sha256)
        except BlobMissing:
            return False
        return True


def _use(path: Path) -> None:
    """Note that a fetched file is used, whatever the mount says of atimes; now and then, and before it is checked: what
    is remembered of a check holds until the file's times change."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if time.time() - found.st_atime > KEPT_SECONDS / 4:
        os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(CHUNK):
        yield chunk


def _checked(chunks: Iterable[bytes], sha256: str) -> Iterator[bytes]:
    """The chunks; raises `BlobCorrupt` in place of their end where they are not what the sha256 says."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != sha256:
        raise BlobCorrupt(sha256)


@contextmanager
def _asking(sha256: str) -> Iterator[None]:
    """obstore's errors in our words."""
    try:
        yield
    except FileNotFoundError:
        raise BlobMissing(sha256) from None
    except BaseError as error:
        raise StoreUnavailable(0, f"the store did not do it ({type(error).__name__})") from error
