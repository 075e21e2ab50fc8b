import hashlib
import os
from pathlib import Path

import pytest

from app.storage.local import BlobCorrupt, BlobMissing, LocalStore

CONTENT = b"what the store is given"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def files(store: LocalStore) -> list[str]:
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


class TestPut:
    def test_lies_under_its_sha256(self, store: LocalStore) -> None:
        assert store.put(CONTENT) == SHA256
        assert files(store) == [f"{SHA256[:2]}/{SHA256}"]
        assert store.read(SHA256) == CONTENT and store.size(SHA256) == len(CONTENT) and SHA256 in store

    def test_twice_is_once(self, store: LocalStore, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(CONTENT)
        assert store.put(CONTENT) == store.put_file(tmp_path / "source")
        assert len(files(store)) == 1

    def test_mends_a_blob_that_was_damaged(self, store: LocalStore) -> None:
        store.path(store.put(CONTENT)).write_bytes(b"damaged")
        store.put(CONTENT)
        assert store.read(SHA256) == CONTENT

    def test_a_failed_write_leaves_nothing(self, store: LocalStore) -> None:
        with pytest.raises(RuntimeError), store.writing() as file:
            file.write(CONTENT)
            raise RuntimeError("half way")
        assert files(store) == []

    def test_is_there_only_once_it_is_whole(self, store: LocalStore) -> None:
        with store.writing() as file:
            file.write(CONTENT)
            assert SHA256 not in store
        assert SHA256 in store

    def test_a_full_disk_leaves_nothing(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.put(CONTENT)
        assert files(store) == []


class TestRead:
    def test_unknown(self, store: LocalStore) -> None:
        for ask in (store.read, store.size, store.verified):
            with pytest.raises(BlobMissing):
                ask("0" * 64)
        assert "0" * 64 not in store

    @pytest.mark.parametrize("damage", [b"What the store is given", CONTENT[:-1], CONTENT + b"!", b""])
    def test_other_bytes_are_refused(self, store: LocalStore, damage: bytes) -> None:
        store.path(store.put(CONTENT)).write_bytes(damage)
        with pytest.raises(BlobCorrupt):
            store.read(SHA256)
        with pytest.raises(BlobCorrupt):
            store.verified(SHA256)

    @pytest.mark.parametrize(
        "name",
        ["../../etc/passwd", "/etc/passwd", SHA256.upper(), SHA256[:-1], SHA256 + "\n", "..", "", f"{SHA256}/.."],
    )
    def test_nothing_but_a_sha256_becomes_a_path(self, store: LocalStore, name: str) -> None:
        store.put(CONTENT)
        with pytest.raises(BlobMissing):
            store.path(name)
        assert name not in store
