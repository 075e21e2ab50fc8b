"""Garbage collection on committed rows, with concurrent publishers."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, select

from app.audit.service import verify
from app.db.engine import Sessions, sessions
from app.db.models import AuditEvent, Image
from app.storage import collect as collecting
from app.storage.collect import Collected, collect_garbage
from app.storage.local import LocalStore
from app.storage.references import pin_blobs
from app.storage.store import Blob, BlobMissing, Store
from tests.patience import patience

HOUR = timedelta(hours=1)


@pytest.fixture
def factory(clean_database: Engine) -> Sessions:
    return sessions(clean_database)


@pytest.fixture
def refer(factory: Sessions) -> Callable[..., None]:
    """Commit a row that references the blob."""

    def add(sha256: str) -> None:
        with factory() as session:
            session.add(image(sha256))
            session.commit()

    return add


@pytest.fixture
def aged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store say that every blob was stored two hours ago."""
    stat, list_blobs = type(store).stat, type(store).list_blobs

    def age(blob: Blob) -> Blob:
        return replace(blob, stored_at=blob.stored_at - 2 * HOUR)

    monkeypatch.setattr(type(store), "stat", lambda self, sha256: age(stat(self, sha256)))
    monkeypatch.setattr(type(store), "list_blobs", lambda self: map(age, list_blobs(self)))


def image(sha256: str) -> Image:
    return Image(sha256=sha256, width=1, height=1, size=1, created_by="test")


def events(factory: Sessions) -> list[AuditEvent]:
    with factory() as session:
        assert verify(session).valid
        return list(session.scalars(select(AuditEvent)))


@pytest.mark.usefixtures("aged")
class TestOldBlobs:
    def test_unreferenced_blobs_are_deleted_with_one_event(
        self, store: Store, factory: Sessions, refer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(collecting, "BATCH", 2)
        kept, *others = [store.put(content) for content in (b"kept", b"1", b"22", b"333", b"4444")]
        refer(kept)
        planned = collect_garbage(factory, store, grace=HOUR, dry_run=True, actor="test")
        assert planned == Collected(blobs=4, bytes=10) and events(factory) == []
        assert all(sha256 in store for sha256 in others)
        assert collect_garbage(factory, store, grace=HOUR, actor="test") == planned
        assert [blob.sha256 for blob in store.list_blobs()] == [kept]
        (event,) = events(factory)
        assert (event.action, event.details["blobs"], event.details["bytes"]) == ("store.collect", 4, 10)
        assert collect_garbage(factory, store, grace=HOUR, actor="test") == Collected()
        assert len(events(factory)) == 1

    def test_collection_waits_for_a_publisher_and_keeps_its_blob(
        self, store: Store, factory: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The publisher has pinned the blob and not yet committed when the collector reaches it."""
        sha256 = store.put(b"published")
        arrived, done = threading.Event(), []
        pause = vars(collecting)["pause_references"]

        def signal_and_pause(session: object) -> None:
            arrived.set()
            pause(session)

        monkeypatch.setattr(collecting, "pause_references", signal_and_pause)
        collector = threading.Thread(
            target=lambda: done.append(collect_garbage(factory, store, grace=HOUR, actor="test"))
        )
        with factory() as session:
            pin_blobs(session, store, [sha256])
            collector.start()
            assert arrived.wait(patience(30))
            collector.join(0.5)
            assert collector.is_alive() and sha256 in store
            session.add(image(sha256))
            session.commit()
        collector.join(30)
        assert done == [Collected()]
        assert store.read(sha256) == b"published"

    def test_publisher_of_a_deleted_blob_gets_blob_missing(
        self, store: Store, factory: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It pins the blob during its deletion, waits, and gets an error; no broken checkpoint is published."""
        sha256 = store.put(b"published")
        errors: list[Exception] = []
        pinning = threading.Event()

        def publish() -> None:
            with factory() as session:
                pinning.set()
                try:
                    pin_blobs(session, store, [sha256])
                except BlobMissing as error:
                    errors.append(error)

        publisher = threading.Thread(target=publish)
        delete = type(store).delete

        def delete_meanwhile(self: Store, name: str) -> None:
            publisher.start()
            assert pinning.wait(patience(30))
            publisher.join(0.5)
            assert publisher.is_alive()
            delete(self, name)

        monkeypatch.setattr(type(store), "delete", delete_meanwhile)
        assert collect_garbage(factory, store, grace=HOUR, actor="test").blobs == 1
        publisher.join(30)
        assert [str(error) for error in errors] == [sha256]


class TestRecentBlobs:
    def test_recent_blob_is_kept(self, store: Store, factory: Sessions) -> None:
        store.put(b"young")
        assert collect_garbage(factory, store, grace=HOUR, actor="test") == Collected()
        assert len(list(store.list_blobs())) == 1

    def test_blob_stored_again_since_it_was_listed_is_kept(
        self, store: Store, factory: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sha256 = store.put(b"put again")
        old = Blob(sha256, 9, datetime.now(UTC) - 2 * HOUR)
        with monkeypatch.context() as patch:
            patch.setattr(type(store), "list_blobs", lambda self: iter([old]))
            assert collect_garbage(factory, store, grace=HOUR, actor="test") == Collected()
        assert sha256 in store


def test_files_of_interrupted_writes_are_deleted(tmp_path: object, factory: Sessions) -> None:
    store = LocalStore(tmp_path / "store")  # type: ignore[operator]
    store.put(b"young")
    (store.folder / "incoming-old").touch()
    os.utime(store.folder / "incoming-old", (0, 0))
    assert collect_garbage(factory, store, grace=HOUR, actor="test") == Collected(temporary_files=1)
    assert [event.details["temporary_files"] for event in events(factory)] == [1]
