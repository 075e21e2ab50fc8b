"""What is of a bucket alone: signed URLs, uploads that fail, what is kept of it on this machine."""

import hashlib
import os
import time
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from app.storage import open_store
from app.storage.s3 import PART, S3Store, _checked
from app.storage.store import BlobCorrupt, StoreUnavailable
from tests.servers import S3Server, free_port

CONTENT = b"what the store is given" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def opened(server: S3Server, folder: Path, **given: object) -> S3Store:
    store = open_store(Settings(**server.settings(folder, **given)))
    assert isinstance(store, S3Store)
    return store


class TestSignedUrl:
    def test_gives_the_blob_to_who_has_no_key(self, s3_server: S3Server, tmp_path: Path) -> None:
        store = opened(s3_server, tmp_path, presigned_min_bytes=100)
        url = store.signed_url(store.put(CONTENT), size=len(CONTENT))
        assert url is not None and url.startswith(s3_server.url) and S3Server.SECRET not in url
        assert httpx.get(url, trust_env=False).content == CONTENT
        part = httpx.get(url, headers={"Range": "bytes=5-9"}, trust_env=False)
        assert (part.status_code, part.content) == (206, CONTENT[5:10])
        forged = url.replace(SHA256[-8:], "00000000")
        assert httpx.get(forged, trust_env=False).status_code == 403
        assert httpx.put(url, content=b"other", trust_env=False).status_code == 403

    def test_not_of_small_files_nor_where_clients_cannot_reach_it(self, s3_server: S3Server, tmp_path: Path) -> None:
        assert opened(s3_server, tmp_path, presigned_min_bytes=100).signed_url(SHA256, size=99) is None
        assert opened(s3_server, tmp_path, presigned_urls=False).signed_url(SHA256, size=1 << 40) is None


class TestUpload:
    @pytest.mark.parametrize("size", [1000, PART + 1000])
    def test_what_changes_on_its_way_never_shows(
        self, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        """The file is hashed, then sent; the last bytes are another's by then."""
        store, source = opened(s3_server, tmp_path / "var"), tmp_path / "source"
        source.write_bytes(bytes(size))

        def changed(chunks: object, sha256: str) -> object:
            return _checked([bytes(size - 1), b"!"], sha256)

        with monkeypatch.context() as patch, pytest.raises(BlobCorrupt):
            patch.setattr("app.storage.s3._checked", changed)
            store.put_file(source)
        assert list(store.list_blobs()) == []

    def test_unavailable(self, s3_server: S3Server, tmp_path: Path) -> None:
        away = {"s3_endpoint": f"http://127.0.0.1:{free_port()}"}
        for given in (away, {"s3_secret_access_key": "not the one"}):
            with pytest.raises(StoreUnavailable) as caught:
                opened(s3_server, tmp_path, **given).put(CONTENT)
            assert S3Server.SECRET not in str(caught.value) + str(caught.value.__cause__)


class TestKeptHere:
    def test_is_fetched_once(self, s3_server: S3Server, tmp_path: Path) -> None:
        store = opened(s3_server, tmp_path)
        path = store.fetch(store.put(CONTENT))
        inode = path.stat().st_ino
        assert store.fetch(SHA256).stat().st_ino == inode
        path.write_bytes(b"damaged")
        assert store.fetch(SHA256).read_bytes() == CONTENT

    def test_a_recent_check_is_relied_on(
        self, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = opened(s3_server, tmp_path)
        path = store.fetch(store.put(CONTENT))
        store.fetch(SHA256, recheck=False)
        monkeypatch.setattr(store.local, "verify", lambda sha256: pytest.fail("it was read again"))
        assert store.fetch(SHA256, recheck=False) == path

    def test_what_was_not_used_for_longest_makes_room(self, s3_server: S3Server, tmp_path: Path) -> None:
        store = opened(s3_server, tmp_path, store_cache_bytes=2 * len(CONTENT) + 2)
        digests = [store.put(CONTENT + bytes([number])) for number in range(4)]
        for sha256, hours in zip(digests[:3], (5, 9, 0), strict=True):
            path = store.fetch(sha256)
            used = time.time() - 3600 * hours
            os.utime(path, (used, path.stat().st_mtime))
        store.fetch(digests[3])
        assert [sha256 in store.local for sha256 in digests] == [True, False, True, True]
        assert all(sha256 in store for sha256 in digests)
