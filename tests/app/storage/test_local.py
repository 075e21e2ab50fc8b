"""What is of a folder alone; `test_store.py` has what every store promises."""

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

CONTENT = b"what the store is given"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def files(store: LocalStore) -> list[str]:
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


def test_layout(store: LocalStore) -> None:
    assert files(store) == []
    store.put(CONTENT)
    assert files(store) == [f"{SHA256[:2]}/{SHA256}"]
    with pytest.raises(BlobMissing):
        store.path("../../etc/passwd")
    store.cache_folder("factors").mkdir()
    (store.cache_folder("factors") / SHA256).touch()
    assert [blob.sha256 for blob in store.list_blobs()] == [SHA256]


def test_a_full_disk_leaves_nothing(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.put(CONTENT)
    assert files(store) == []


class TestRecently:
    """A check that was made is good enough while nothing has written to the file."""

    def test_is_not_read_again(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.fetch(store.put(CONTENT))
        monkeypatch.setattr(store, "verify", lambda sha256: pytest.fail("it was read"))
        assert store.fetch(SHA256, recheck=False) == store.path(SHA256)

    def test_many_at_once_wait_for_one_check(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.put(CONTENT)
        check, checks, together = store.verify, [], threading.Barrier(8)

        def slow(sha256: str) -> None:
            checks.append(sha256)
            time.sleep(0.2)
            check(sha256)

        def verified(_: int) -> Path:
            together.wait(30)
            return store.fetch(SHA256, recheck=False)

        monkeypatch.setattr(store, "verify", slow)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(verified, range(8))) == {store.path(SHA256)}
        assert checks == [SHA256]

    @pytest.mark.parametrize("times", ["new", "set back"])
    def test_a_write_is_seen(self, store: LocalStore, times: str) -> None:
        path = store.fetch(store.put(CONTENT))
        found = path.stat()
        path.write_bytes(CONTENT[::-1])
        if times == "set back":
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        with pytest.raises(BlobCorrupt):
            store.fetch(SHA256, recheck=False)

    def test_is_forgotten_after_minutes(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.fetch(store.put(CONTENT))
        monkeypatch.setattr("app.storage.local.RECENT_SECONDS", 0.0)
        path = store.path(SHA256)
        monkeypatch.setattr("app.storage.local._state", lambda found: (1, 1, 1, 1))  # a flip that no time tells of
        path.write_bytes(CONTENT[::-1])
        with pytest.raises(BlobCorrupt):
            store.fetch(SHA256, recheck=False)


def test_sweep_takes_what_died_writes_left(store: LocalStore) -> None:
    store.put(CONTENT)
    old, young = store.folder / "incoming-old", store.folder / "incoming-young"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    assert store.remove_temporary_files(before=datetime.now(UTC) - timedelta(hours=1)) == 1
    assert files(store) == [f"{SHA256[:2]}/{SHA256}", "incoming-young"]
