"""The promises of every store. `test_local.py` and `test_s3.py` test what is special to one."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import pytest

from app.storage.store import BlobCorrupt, BlobMissing, Store
from tests.app.storage.conftest import Damage

CONTENT = b"the content of a blob"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def digests(store: Store) -> list[str]:
    return sorted(blob.sha256 for blob in store.list_blobs())


class TestPut:
    def test_blob_is_stored_by_its_sha256(self, store: Store) -> None:
        assert store.put(CONTENT) == SHA256
        assert digests(store) == [SHA256]
        assert store.read(SHA256) == CONTENT and store.stat(SHA256).size == len(CONTENT) and SHA256 in store
        store.verify(SHA256)
        assert store.fetch(SHA256).read_bytes() == CONTENT

    def test_equal_content_is_stored_once(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(CONTENT)
        assert store.put(CONTENT) == store.put_file(tmp_path / "source") == SHA256
        assert digests(store) == [SHA256]

    def test_file_larger_than_an_upload_part(self, store: Store, tmp_path: Path) -> None:
        content = bytes(range(256)) * (20 << 12) + b"end"
        (tmp_path / "large").write_bytes(content)
        sha256 = store.put_file(tmp_path / "large")
        assert sha256 == hashlib.sha256(content).hexdigest() and store.stat(sha256).size == len(content)
        store.verify(sha256)
        assert store.fetch(sha256).read_bytes() == content

    def test_empty_file(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        sha256 = store.put_file(tmp_path / "empty")
        assert store.put(b"") == sha256 and store.read(sha256) == b"" and store.stat(sha256).size == 0

    def test_put_repairs_a_damaged_blob(self, store: Store, damage: Damage) -> None:
        damage(store.put(CONTENT), b"damaged")
        store.put(CONTENT)
        assert store.read(SHA256) == CONTENT

    def test_failed_write_leaves_nothing(self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail_midway(file: BinaryIO) -> Iterator[bytes]:
            yield CONTENT[:5]
            raise RuntimeError("cannot be read")

        monkeypatch.setattr(f"{type(store).__module__}.read_chunks", fail_midway)
        (tmp_path / "source").write_bytes(CONTENT)
        with pytest.raises(RuntimeError):
            store.put_file(tmp_path / "source")
        assert digests(store) == [] and SHA256 not in store

    def test_blob_is_visible_only_when_complete(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []

        def look_midway(file: BinaryIO) -> Iterator[bytes]:
            yield CONTENT[:5]
            seen.append(SHA256 in store)
            yield CONTENT[5:]

        monkeypatch.setattr(f"{type(store).__module__}.read_chunks", look_midway)
        (tmp_path / "source").write_bytes(CONTENT)
        store.put_file(tmp_path / "source")
        assert seen == [False] and SHA256 in store

    def test_putting_again_renews_the_time(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        before = datetime.now(UTC) - timedelta(seconds=5)
        store.put(CONTENT)
        first = store.stat(SHA256).stored_at
        assert before < first < datetime.now(UTC) + timedelta(seconds=5)
        while (again := datetime.now(UTC)) < first + timedelta(seconds=1.5):  # the bucket's clock has whole seconds
            pass
        store.put(CONTENT)
        assert first < store.stat(SHA256).stored_at <= again + timedelta(seconds=5)
        assert list(store.list_blobs()) == [store.stat(SHA256)]


class TestRead:
    def test_unknown_blob_is_missing(self, store: Store) -> None:
        for method in (store.read, store.fetch, store.verify, store.stat, store.quarantine):
            with pytest.raises(BlobMissing):
                method("0" * 64)
        assert "0" * 64 not in store
        store.delete("0" * 64)

    @pytest.mark.parametrize("wrong", [b"The content of a blob", CONTENT[:-1], CONTENT + b"!", b""])
    def test_damaged_blob_is_refused(self, store: Store, damage: Damage, wrong: bytes) -> None:
        damage(store.put(CONTENT), wrong)
        for method in (store.read, store.fetch, store.verify):
            with pytest.raises(BlobCorrupt):
                method(SHA256)

    @pytest.mark.parametrize(
        "name",
        ["../../etc/passwd", "/etc/passwd", SHA256.upper(), SHA256[:-1], SHA256 + "\n", "..", "", f"{SHA256}/.."],
    )
    def test_anything_but_a_sha256_is_missing(self, store: Store, name: str) -> None:
        store.put(CONTENT)
        for method in (store.read, store.fetch, store.stat, store.delete, store.quarantine):
            with pytest.raises(BlobMissing):
                method(name)
        assert name not in store


class TestDelete:
    def test_deleted_blob_is_missing(self, store: Store) -> None:
        other = store.put(b"other")
        store.put(CONTENT)
        store.fetch(SHA256)
        store.delete(SHA256)
        assert SHA256 not in store and digests(store) == [other]
        with pytest.raises(BlobMissing):
            store.fetch(SHA256)

    def test_blob_can_be_put_again_after_quarantine(self, store: Store, damage: Damage) -> None:
        damage(store.put(CONTENT), b"damaged")
        store.quarantine(SHA256)
        assert SHA256 not in store and digests(store) == []
        store.put(CONTENT)
        store.verify(SHA256)
