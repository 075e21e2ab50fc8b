import threading
from pathlib import Path

import pytest

from app.models.snapshot import snapshot
from app.storage.local import LocalStore
from app.storage.store import BlobCorrupt, BlobMissing


@pytest.fixture
def files(store: LocalStore) -> list[tuple[str, str]]:
    return [("model_index.json", store.put(b"{}")), ("unet/config.json", store.put(b"config"))]


def test_lays_files_out(store: LocalStore, files: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = snapshot(store, files, folder=tmp_path)
    assert folder.parent == tmp_path / "snapshots"
    assert (folder / "model_index.json").read_bytes() == b"{}"
    assert (folder / "unet" / "config.json").read_bytes() == b"config"
    assert (folder / "model_index.json").resolve() == store.path(files[0][1]).resolve()
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_is_found_again_in_any_order(store: LocalStore, files: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = snapshot(store, files, folder=tmp_path)
    made = folder.stat().st_ctime_ns
    assert snapshot(store, files[::-1], folder=tmp_path) == folder
    assert folder.stat().st_ctime_ns == made
    assert snapshot(store, files[:1], folder=tmp_path) != folder


def test_damaged_blob_is_refused(store: LocalStore, files: list[tuple[str, str]], tmp_path: Path) -> None:
    store.path(files[1][1]).write_bytes(b"confiG")
    with pytest.raises(BlobCorrupt):
        snapshot(store, files, folder=tmp_path)
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_blob_damaged_later_is_refused(store: LocalStore, files: list[tuple[str, str]], tmp_path: Path) -> None:
    snapshot(store, files, folder=tmp_path)
    store.path(files[1][1]).write_bytes(b"confiG")
    with pytest.raises(BlobCorrupt):
        snapshot(store, files, folder=tmp_path)


def test_missing_blob(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing):
        snapshot(store, [("a", "0" * 64)], folder=tmp_path)


def test_broken_links_are_laid_again(store: LocalStore, files: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = snapshot(store, files, folder=tmp_path)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to(tmp_path / "where the store was")
    assert snapshot(store, files, folder=tmp_path) == folder
    assert (folder / "model_index.json").read_bytes() == b"{}"


@pytest.mark.parametrize("path", ["/etc/passwd", "../a", "a/../../b", "a\\b", "a\0", "", "."])
def test_no_path_leads_out(store: LocalStore, tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside a model"):
        snapshot(store, [(path, store.put(b"x"))], folder=tmp_path)


def test_many_at_once(store: LocalStore, files: list[tuple[str, str]], tmp_path: Path) -> None:
    made, failed = [], []

    def make() -> None:
        try:
            made.append(snapshot(store, files, folder=tmp_path))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set(made)) == 1
    assert [entry.name for entry in (tmp_path / "snapshots").iterdir()] == [made[0].name]
