"""What is collected and what never is: on committed rows, with publishers at the same time."""

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, select

from app.audit.service import verify
from app.db.engine import Sessions, sessions
from app.db.models import AuditEvent, Image
from app.storage import collect as collecting
from app.storage.collect import Collected, collect
from app.storage.local import LocalStore
from app.storage.references import pin_blobs
from app.storage.store import Blob, BlobMissing, Store

HOUR = timedelta(hours=1)


@pytest.fixture
def factory(clean_database: Engine) -> Sessions:
    return sessions(clean_database)


@pytest.fixture
def refer(factory: Sessions) -> Callable[..., None]:
    """Commit a row that refers to the blob."""

    def add(sha256: str) -> None:
        with factory() as session:
            session.add(image(sha256))
            session.commit()

    return add


@pytest.fixture
def aged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is in the store now was put two hours ago, by what the store says."""
    monkeypatch.setattr(type(store), "stored_at", older(type(store).stored_at))
    listed = type(store).list_blobs

    def blobs(self: Store) -> list[Blob]:
        return [Blob(blob.sha256, blob.size, blob.stored_at - 2 * HOUR) for blob in listed(self)]

    monkeypatch.setattr(type(store), "list_blobs", lambda self: iter(blobs(self)))


def older(stored_at: Callable[[Store, str], datetime]) -> Callable[[Store, str], datetime]:
    return lambda self, sha256: stored_at(self, sha256) - 2 * HOUR


def image(sha256: str) -> Image:
    return Image(sha256=sha256, width=1, height=1, size=1, created_by="test")


def events(factory: Sessions) -> list[AuditEvent]:
    with factory() as session:
        assert verify(session).valid
        return list(session.scalars(select(AuditEvent)))


@pytest.mark.usefixtures("aged")
class TestOld:
    def test_what_nothing_refers_to_goes(
        self, store: Store, factory: Sessions, refer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(collecting, "BATCH", 2)
        kept, *others = [store.put(content) for content in (b"kept", b"1", b"22", b"333", b"4444")]
        refer(kept)
        asked = collect(factory, store, grace=HOUR, dry_run=True, actor="test")
        assert asked == Collected(blobs=4, bytes=10) and events(factory) == []
        assert all(sha256 in store for sha256 in others)
        assert collect(factory, store, grace=HOUR, actor="test") == asked
        assert [blob.sha256 for blob in store.list_blobs()] == [kept]
        (event,) = events(factory)
        assert (event.action, event.details["blobs"], event.details["bytes"]) == ("store.collect", 4, 10)
        assert collect(factory, store, grace=HOUR, actor="test") == Collected()
        assert len(events(factory)) == 1

    def test_waits_for_a_publisher_and_sees_its_rows(
        self, store: Store, factory: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The publisher holds its claim, not yet committed, while the collector comes to the blob."""
        sha256 = store.put(b"published")
        arrived, done = threading.Event(), []
        hold = collecting.pause_references

        def hold_and_tell(session: object) -> None:
            arrived.set()
            hold(session)  # type: ignore[arg-type]

        monkeypatch.setattr(collecting, "pause_references", hold_and_tell)
        collector = threading.Thread(target=lambda: done.append(collect(factory, store, grace=HOUR, actor="test")))
        with factory() as session:
            pin_blobs(session, store, [sha256])
            collector.start()
            assert arrived.wait(30)
            collector.join(0.5)
            assert collector.is_alive() and sha256 in store
            session.add(image(sha256))
            session.commit()
        collector.join(30)
        assert done == [Collected()]
        assert store.read(sha256) == b"published"

    def test_a_publisher_that_came_too_late_is_told(
        self, store: Store, factory: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It claims while the collector is at the blob, waits, and finds it gone: nothing broken is published."""
        sha256 = store.put(b"published")
        told: list[Exception] = []
        claiming = threading.Event()

        def publish() -> None:
            with factory() as session:
                claiming.set()
                try:
                    pin_blobs(session, store, [sha256])
                except BlobMissing as error:
                    told.append(error)

        publisher = threading.Thread(target=publish)
        delete = type(store).delete

        def delete_meanwhile(self: Store, name: str) -> None:
            publisher.start()
            assert claiming.wait(30)
            publisher.join(0.5)
            assert publisher.is_alive()
            delete(self, name)

        monkeypatch.setattr(type(store), "delete", delete_meanwhile)
        assert collect(factory, store, grace=HOUR, actor="test").blobs == 1
        publisher.join(30)
        assert [str(error) for error in told] == [sha256]


class TestYoung:
    def test_stays(self, store: Store, factory: Sessions) -> None:
        store.put(b"young")
        assert collect(factory, store, grace=HOUR, actor="test") == Collected()
        assert len(list(store.list_blobs())) == 1

    def test_what_was_put_again_since_it_was_listed_stays(
        self, store: Store, factory: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sha256 = store.put(b"put again")
        old = Blob(sha256, 9, datetime.now(UTC) - 2 * HOUR)
        with monkeypatch.context() as patch:
            patch.setattr(type(store), "list_blobs", lambda self: iter([old]))
            assert collect(factory, store, grace=HOUR, actor="test") == Collected()
        assert sha256 in store


def test_what_died_writes_left(tmp_path: object, factory: Sessions) -> None:
    store = LocalStore(tmp_path / "store")  # type: ignore[operator]
    store.put(b"young")
    (store.folder / "incoming-old").touch()
    os.utime(store.folder / "incoming-old", (0, 0))
    assert collect(factory, store, grace=HOUR, actor="test") == Collected(temporaries=1)
    assert [event.details["temporaries"] for event in events(factory)] == [1]
