"""Compare all blobs with their sha256 and with the references in the database."""

import hashlib

import pytest
from sqlalchemy import Engine, select

from app.db.engine import Sessions, sessions
from app.db.models import AuditEvent, Image
from app.storage.scrub import Finding, scrub
from app.storage.store import Store
from tests.app.storage.conftest import Damage


@pytest.fixture
def factory(clean_database: Engine) -> Sessions:
    return sessions(clean_database)


def add_reference(factory: Sessions, sha256: str) -> None:
    with factory() as session:
        session.add(Image(sha256=sha256, width=1, height=1, size=1, created_by="test"))
        session.commit()


def actions(factory: Sessions) -> list[tuple[str, object]]:
    with factory() as session:
        return [(event.action, event.details) for event in session.scalars(select(AuditEvent))]


def test_undamaged_store_is_clean(store: Store, factory: Sessions) -> None:
    add_reference(factory, store.put(b"one"))
    store.put(b"three")
    seen: list[tuple[int, int]] = []
    found = scrub(factory, store, actor="test", on_progress=lambda done, total: seen.append((done, total)))
    assert found.is_clean and (found.blobs, found.bytes) == (2, 8)
    assert seen[-1] == (8, 8) and len(seen) == 2
    assert actions(factory) == []


def test_damaged_and_missing_blobs_are_named(store: Store, factory: Sessions, damage: Damage) -> None:
    flipped, cut, sound = [store.put(content) for content in (b"flipped", b"cut off", b"sound")]
    missing = hashlib.sha256(b"never stored").hexdigest()
    add_reference(factory, flipped)
    add_reference(factory, missing)
    damage(flipped, b"Flipped")
    damage(cut, b"cut")
    found = scrub(factory, store, actor="test")
    assert {finding.sha256: list(finding.references) for finding in found.damaged} == {
        flipped: [f"image:sha256:{flipped}"],
        cut: [],
    }
    assert found.missing == [Finding(missing, [f"image:sha256:{missing}"])]
    assert not found.is_clean and flipped in store and actions(factory) == []
    assert store.read(sound) == b"sound"


def test_quarantined_blob_is_missing_until_put_again(store: Store, factory: Sessions, damage: Damage) -> None:
    sha256 = store.put(b"flipped")
    add_reference(factory, sha256)
    damage(sha256, b"Flipped")
    found = scrub(factory, store, quarantine=True, actor="test")
    assert found.quarantined and [finding.sha256 for finding in found.damaged] == [sha256]
    assert actions(factory) == [("store.quarantine", {"blobs": 1})]
    again = scrub(factory, store, quarantine=True, actor="test")
    assert (again.damaged, [finding.sha256 for finding in again.missing]) == ([], [sha256])
    store.put(b"flipped")
    assert scrub(factory, store, actor="test").is_clean
