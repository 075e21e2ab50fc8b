"""What is special to a bucket: presigned URLs, failed uploads, the local cache."""

import hashlib
import os
import time
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from app.storage import open_store
from app.storage.s3 import PART, S3Store, _verify
from app.storage.store import BlobCorrupt, StoreUnavailable
from tests.servers import S3Server, free_port

CONTENT = b"the content of a blob" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def opened(server: S3Server, folder: Path, **given: object) -> S3Store:
    store = open_store(Settings(**server.settings(folder, **given)))
    assert isinstance(store, S3Store)
    return store


class TestPresignedUrl:
    def test_url_gives_one_blob_without_credentials(self, s3_server: S3Server, tmp_path: Path) -> None:
        store = opened(s3_server, tmp_path, presigned_min_bytes=100)
        url = store.presigned_url(store.put(CONTENT), size=len(CONTENT))
        assert url is not None and url.startswith(s3_server.url) and S3Server.SECRET not in url
        assert httpx.get(url, trust_env=False).content == CONTENT
        part = httpx.get(url, headers={"Range": "bytes=5-9"}, trust_env=False)
        assert (part.status_code, part.content) == (206, CONTENT[5:10])
        forged = url.replace(SHA256[-8:], "00000000")
        assert httpx.get(forged, trust_env=False).status_code == 403
        assert httpx.put(url, content=b"other", trust_env=False).status_code == 403

    def test_no_url_for_small_files_or_if_disabled(self, s3_server: S3Server, tmp_path: Path) -> None:
        assert opened(s3_server, tmp_path, presigned_min_bytes=100).presigned_url(SHA256, size=99) is None
        assert opened(s3_server, tmp_path, presigned_urls=False).presigned_url(SHA256, size=1 << 40) is None


class TestUpload:
    @pytest.mark.parametrize("size", [1000, PART + 1000])
    def test_file_that_changes_during_upload_is_not_stored(
        self, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        """The file is hashed, then sent; its last byte changes in between."""
        store, source = opened(s3_server, tmp_path / "var"), tmp_path / "source"
        source.write_bytes(bytes(size))

        def changed(chunks: object, sha256: str) -> object:
            return _verify([bytes(size - 1), b"!"], sha256)

        with monkeypatch.context() as patch, pytest.raises(BlobCorrupt):
            patch.setattr("app.storage.s3._verify", changed)
            store.put_file(source)
        assert list(store.list_blobs()) == []

    def test_store_unavailable_does_not_show_the_secret(self, s3_server: S3Server, tmp_path: Path) -> None:
        away = {"s3_endpoint": f"http://127.0.0.1:{free_port()}"}
        for given in (away, {"s3_secret_access_key": "not the one"}):
            with pytest.raises(StoreUnavailable) as caught:
                opened(s3_server, tmp_path, **given).put(CONTENT)
            assert S3Server.SECRET not in str(caught.value) + str(caught.value.__cause__)


class TestCache:
    def test_blob_is_fetched_once(self, s3_server: S3Server, tmp_path: Path) -> None:
        store = opened(s3_server, tmp_path)
        path = store.fetch(store.put(CONTENT))
        inode = path.stat().st_ino
        assert store.fetch(SHA256).stat().st_ino == inode
        path.write_bytes(b"damaged")
        assert store.fetch(SHA256).read_bytes() == CONTENT

    def test_recent_check_of_the_cache_is_accepted(
        self, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = opened(s3_server, tmp_path)
        path = store.fetch(store.put(CONTENT))
        store.fetch(SHA256, recheck=False)
        monkeypatch.setattr(store.local, "verify", lambda sha256: pytest.fail("the blob was read again"))
        assert store.fetch(SHA256, recheck=False) == path

    def test_least_recently_used_blob_is_evicted(self, s3_server: S3Server, tmp_path: Path) -> None:
        store = opened(s3_server, tmp_path, store_cache_bytes=2 * len(CONTENT) + 2)
        digests = [store.put(CONTENT + bytes([number])) for number in range(4)]
        for sha256, hours in zip(digests[:3], (5, 9, 0), strict=True):
            path = store.fetch(sha256)
            used = time.time() - 3600 * hours
            os.utime(path, (used, path.stat().st_mtime))
        store.fetch(digests[3])
        assert [sha256 in store.local for sha256 in digests] == [True, False, True, True]
        assert all(sha256 in store for sha256 in digests)
