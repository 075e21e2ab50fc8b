import hashlib
import json
from datetime import UTC, datetime

import pytest
from sqlalchemy.orm import Session

from app.audit.service import GENESIS, digest, record, verify
from app.db.models import AuditEvent

pytestmark = pytest.mark.security


def test_events_from_before_there_was_a_reason_keep_their_hashes() -> None:
    """The form in which they were hashed until 0006: stored chains depend on it."""
    at = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
    event = AuditEvent(sequence=1, at=at, actor="cli", action="key.create", target="key:a", details={"weight": 2.0})
    event.previous_hash = GENESIS
    content = {
        "sequence": 1,
        "at": "2026-11-24T12:00:00.000000+00:00",
        "actor": "cli",
        "action": "key.create",
        "target": "key:a",
        "details": {"weight": 2},
        "previous": "0" * 64,
    }
    expected = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()
    assert digest(event) == expected


def test_every_column_is_hashed(session: Session) -> None:
    record(session, actor="a", action="b", target="c")
    event = session.get_one(AuditEvent, 1)
    seen = {digest(event)}
    changes = {
        "at": datetime(2020, 1, 1, tzinfo=UTC), "actor": "x", "action": "x", "target": "x", "details": {"x": 1},
        "before": {"x": 1}, "after": {"x": 1}, "reason": "x", "request_id": "x", "address": "x", "sequence": 7,
        "previous_hash": b"x" * 32,
    }  # fmt: skip
    assert changes.keys() == {column.key for column in AuditEvent.__table__.columns} - {"hash"}
    with session.no_autoflush:
        for name, value in changes.items():
            kept = getattr(event, name)
            setattr(event, name, value)
            seen.add(digest(event))
            setattr(event, name, kept)
        assert digest(event) == event.hash
    assert len(seen) == len(changes) + 1
    session.expire(event)


def test_the_request_is_that_of_the_session(session: Session) -> None:
    session.info.update(request_id="r-1", address="192.0.2.1")
    record(session, actor="a", action="b", target="c", before={"n": 1}, after={"n": 1e22}, reason="why")
    session.commit()
    session.expire_all()
    event = session.get_one(AuditEvent, 1)
    assert (event.request_id, event.address, event.reason, event.before) == ("r-1", "192.0.2.1", "why", {"n": 1})
    assert verify(session).valid


def test_a_log_cut_short_no_longer_holds_the_head_that_was_kept(session: Session) -> None:
    record(session, actor="a", action="b", target="c")
    head = verify(session).head
    record(session, actor="a", action="b", target="c")
    assert verify(session, head=head).valid
    found = verify(session, head="0" * 64)
    assert (found.valid, found.broken_at, found.events) == (False, None, 2)
    assert found.reason is not None and "cut short" in found.reason
