"""What is special to a folder. `test_store.py` tests the promises of every store."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.storage.local import LocalStore
from app.storage.store import BlobCorrupt, BlobMissing
from tests.patience import patience

CONTENT = b"the content of a blob"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def files(store: LocalStore) -> list[str]:
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


def test_blobs_are_files_named_by_their_sha256(store: LocalStore) -> None:
    assert files(store) == []
    store.put(CONTENT)
    assert files(store) == [f"{SHA256[:2]}/{SHA256}"]
    with pytest.raises(BlobMissing):
        store.path("../../etc/passwd")
    (store.folder / "factors").mkdir()
    (store.folder / "factors" / SHA256).touch()
    assert [blob.sha256 for blob in store.list_blobs()] == [SHA256]


def test_full_disk_leaves_no_file(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.put(CONTENT)
    assert files(store) == []


class TestRecheck:
    """`recheck=False` accepts a recent check of a file that has not changed."""

    def test_unchanged_file_is_not_read_again(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.fetch(store.put(CONTENT), recheck=False)
        monkeypatch.setattr(store, "verify", lambda sha256: pytest.fail("the blob was read again"))
        assert store.fetch(SHA256, recheck=False) == store.path(SHA256)

    def test_concurrent_calls_wait_for_one_check(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.put(CONTENT)
        verify, checks, together = store.verify, [], threading.Barrier(8)

        def slow(sha256: str) -> None:
            checks.append(sha256)
            time.sleep(0.2)
            verify(sha256)

        def fetch(_: int) -> Path:
            together.wait(patience(30))
            return store.fetch(SHA256, recheck=False)

        monkeypatch.setattr(store, "verify", slow)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(fetch, range(8))) == {store.path(SHA256)}
        assert checks == [SHA256]

    @pytest.mark.parametrize("times", ["new", "set back"])
    def test_write_to_the_file_is_noticed(self, store: LocalStore, times: str) -> None:
        path = store.fetch(store.put(CONTENT), recheck=False)
        found = path.stat()
        path.write_bytes(CONTENT[::-1])
        if times == "set back":
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        with pytest.raises(BlobCorrupt):
            store.fetch(SHA256, recheck=False)

    def test_check_expires(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("app.storage.local._state", lambda found: (1, 1, 1, 1))  # the flipped bit changes no time
        path = store.fetch(store.put(CONTENT), recheck=False)
        path.write_bytes(CONTENT[::-1])
        assert store.fetch(SHA256, recheck=False) == path
        monkeypatch.setattr("app.storage.local.RECENT_SECONDS", 1e-9)
        with pytest.raises(BlobCorrupt):
            store.fetch(SHA256, recheck=False)


def test_only_old_temporary_files_are_removed(store: LocalStore) -> None:
    store.put(CONTENT)
    old, young = store.folder / "incoming-old", store.folder / "incoming-young"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    assert store.remove_temporary_files(before=datetime.now(UTC) - timedelta(hours=1)) == 1
    assert files(store) == [f"{SHA256[:2]}/{SHA256}", "incoming-young"]
