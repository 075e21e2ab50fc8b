"""What every store promises; `test_local.py` and `test_s3.py` have what is of one alone."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.storage.store import Blob, BlobCorrupt, BlobMissing, Store
from tests.app.storage.conftest import Damage

CONTENT = b"what the store is given"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def digests(store: Store) -> list[str]:
    return sorted(blob.sha256 for blob in store.list_blobs())


class TestPut:
    def test_lies_under_its_sha256(self, store: Store) -> None:
        assert store.put(CONTENT) == SHA256
        assert digests(store) == [SHA256]
        assert store.read(SHA256) == CONTENT and store.size(SHA256) == len(CONTENT) and SHA256 in store
        store.verify(SHA256)
        assert store.fetch(SHA256).read_bytes() == CONTENT

    def test_twice_is_once(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(CONTENT)
        with store.open_writer() as file:
            file.write(CONTENT)
        assert store.put(CONTENT) == store.put_file(tmp_path / "source") == file.sha256
        assert digests(store) == [SHA256]

    def test_a_large_file(self, store: Store, tmp_path: Path) -> None:
        """Larger than a part of an upload."""
        content = bytes(range(256)) * (20 << 12) + b"end"
        (tmp_path / "large").write_bytes(content)
        sha256 = store.put_file(tmp_path / "large")
        assert sha256 == hashlib.sha256(content).hexdigest() and store.size(sha256) == len(content)
        store.verify(sha256)
        assert store.fetch(sha256).read_bytes() == content

    def test_an_empty_one(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        sha256 = store.put_file(tmp_path / "empty")
        assert store.put(b"") == sha256 and store.read(sha256) == b"" and store.size(sha256) == 0

    def test_mends_a_blob_that_was_damaged(self, store: Store, damage: Damage) -> None:
        damage(store.put(CONTENT), b"damaged")
        store.put(CONTENT)
        assert store.read(SHA256) == CONTENT

    def test_a_failed_write_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(RuntimeError), store.open_writer() as file:
            file.write(CONTENT)
            raise RuntimeError("half way")
        assert digests(store) == [] and SHA256 not in store

    def test_is_there_only_once_it_is_whole(self, store: Store) -> None:
        with store.open_writer() as file:
            file.write(CONTENT)
            assert SHA256 not in store
        assert SHA256 in store

    def test_what_is_put_again_is_young_again(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        before = datetime.now(UTC) - timedelta(seconds=5)
        store.put(CONTENT)
        first = store.stored_at(SHA256)
        assert before < first < datetime.now(UTC) + timedelta(seconds=5)
        while (again := datetime.now(UTC)) < first + timedelta(seconds=1.5):  # the bucket's clock ticks by the second
            pass
        store.put(CONTENT)
        assert first < store.stored_at(SHA256) <= again + timedelta(seconds=5)
        assert list(store.list_blobs()) == [Blob(SHA256, len(CONTENT), store.stored_at(SHA256))]


class TestRead:
    def test_unknown(self, store: Store) -> None:
        for ask in (store.read, store.size, store.fetch, store.verify, store.stored_at, store.quarantine):
            with pytest.raises(BlobMissing):
                ask("0" * 64)
        assert "0" * 64 not in store
        store.delete("0" * 64)

    @pytest.mark.parametrize("wrong", [b"What the store is given", CONTENT[:-1], CONTENT + b"!", b""])
    def test_other_bytes_are_refused(self, store: Store, damage: Damage, wrong: bytes) -> None:
        damage(store.put(CONTENT), wrong)
        for ask in (store.read, store.fetch, store.verify):
            with pytest.raises(BlobCorrupt):
                ask(SHA256)

    @pytest.mark.parametrize(
        "name",
        ["../../etc/passwd", "/etc/passwd", SHA256.upper(), SHA256[:-1], SHA256 + "\n", "..", "", f"{SHA256}/.."],
    )
    def test_nothing_but_a_sha256_is_looked_for(self, store: Store, name: str) -> None:
        store.put(CONTENT)
        for ask in (store.read, store.fetch, store.delete, store.quarantine):
            with pytest.raises(BlobMissing):
                ask(name)
        assert name not in store


class TestKeep:
    def test_delete(self, store: Store) -> None:
        other = store.put(b"other")
        store.put(CONTENT)
        store.fetch(SHA256)
        store.delete(SHA256)
        assert SHA256 not in store and digests(store) == [other]
        with pytest.raises(BlobMissing):
            store.fetch(SHA256)

    def test_quarantine_makes_way(self, store: Store, damage: Damage) -> None:
        damage(store.put(CONTENT), b"damaged")
        store.quarantine(SHA256)
        assert SHA256 not in store and digests(store) == []
        store.put(CONTENT)
        store.verify(SHA256)
