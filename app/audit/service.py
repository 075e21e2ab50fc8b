"""The audit log. Each event contains the hash of the previous one, so changed and missing rows are detected."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import Select, literal_column, or_, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app.audit.events import SUBSCRIBERS
from app.db.models import AuditEvent, JsonObject
from app.db.pagination import PageCursor
from app.db.rows import column_values
from emender.schemas.audit import AuditEventOut, Verification
from emender.schemas.common import Page

GENESIS = bytes(32)
LOCK = 0x61756469  # an advisory lock until the end of the transaction: events are written one after the other


def record(
    session: Session,
    *,
    actor: str,
    action: str,
    target: str,
    details: JsonObject | None = None,
    before: JsonObject | None = None,
    after: JsonObject | None = None,
    reason: str | None = None,
) -> None:
    """Add an event to the caller's transaction, and call the subscribers (`app.audit.events`) in it.

    `before` and `after` are the changed parts of the target; None if it did not exist, or was deleted. The request's id
    and address are those of the session. Never pass a secret.
    """
    session.flush()  # before the lock, which serializes all writers of events
    session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    newest = select(AuditEvent.sequence, AuditEvent.hash).order_by(AuditEvent.sequence.desc()).limit(1)
    sequence, previous = session.execute(newest).one_or_none() or (0, GENESIS)
    event = AuditEvent(
        sequence=sequence + 1,
        at=datetime.now(UTC),
        actor=actor,
        action=action,
        target=target,
        details=details or {},
        before=before,
        after=after,
        reason=reason,
        request_id=session.info.get("request_id"),
        address=session.info.get("address"),
        previous_hash=previous,
    )
    event.hash = digest(event)
    session.add(event)
    for subscriber in SUBSCRIBERS[action]:
        subscriber(session, event)


def digest(event: AuditEvent) -> bytes:
    """Return the sha256 of the event as canonical JSON, which includes the previous hash.

    Empty columns are left out, so events that are older than a column keep their hashes.
    """
    at = event.at.astimezone(UTC).isoformat(timespec="microseconds")
    names = ("sequence", "actor", "action", "target", "details", "before", "after", "reason", "request_id", "address")
    columns = {name: getattr(event, name) for name in names if getattr(event, name) is not None}
    content = columns | {"at": at, "previous": event.previous_hash.hex()}
    content = json.loads(json.dumps(content), parse_float=_canonical_number)
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()


@dataclass(frozen=True)
class AuditFilter:
    """The events to select. None selects all."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    request_id: str | None = None
    edit: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None

    def select(self) -> Select[AuditEvent]:
        values = {name: getattr(self, name) for name in ("actor", "action", "target", "request_id")}
        query = select(AuditEvent).filter_by(**{name: value for name, value in values.items() if value is not None})
        if self.edit is not None:  # written as its index is
            has_edit = literal_column("details -> 'edits'", JSONB).contains([str(self.edit)])
            query = query.where(or_(AuditEvent.target == f"edit:{self.edit}", has_edit))
        if self.since is not None:
            query = query.where(AuditEvent.at >= _in_utc(self.since))
        if self.until is not None:
            query = query.where(AuditEvent.at < _in_utc(self.until))
        return query


def list_events(session: Session, *, filter: AuditFilter, page: PageCursor[int]) -> Page[AuditEventOut]:
    rows, next_cursor = page.fetch(session, filter.select(), AuditEvent.sequence)
    return Page(items=[_event_out(row) for row in rows], next=next_cursor)


def stream_events(session: Session, *, filter: AuditFilter) -> Iterator[AuditEventOut]:
    """Yield every event that the filter selects, oldest first."""
    return map(_event_out, _stream(session, filter.select().order_by(AuditEvent.sequence)))


def verify(session: Session, *, head: str | None = None) -> Verification:
    """Compute every hash again, from the first event to the last.

    `head` is the hash, in hex, that an earlier verification returned. If no event has it, the log was cut short or
    written anew.
    """
    count, previous, has_head = 0, GENESIS, head is None

    def broken(reason: str, at: int | None) -> Verification:
        last = previous.hex() if count else None
        return Verification(valid=False, events=count, head=last, broken_at=at, reason=reason)

    for event in _stream(session, select(AuditEvent).order_by(AuditEvent.sequence)):
        if event.sequence != count + 1:
            return broken(f"event {count + 1} is missing", event.sequence)
        if event.previous_hash != previous:
            return broken("it does not contain the hash of the event before", event.sequence)
        if event.hash != digest(event):
            return broken("its hash is not that of its content: it was changed", event.sequence)
        count, previous = count + 1, event.hash
        has_head = has_head or event.hash.hex() == head
    if not has_head:
        return broken("no event has the given head: the log was cut short or written anew", None)
    return Verification(valid=True, events=count, head=previous.hex() if count else None)


def _stream(session: Session, query: Select[AuditEvent]) -> Iterator[AuditEvent]:
    """Yield rows from a cursor on the server, since the log can be long. The session does not keep them."""
    with closing(session.scalars(query.execution_options(yield_per=500))) as events:
        for event in events:
            yield event
            session.expunge(event)


def _event_out(event: AuditEvent) -> AuditEventOut:
    hashes = {"previous_hash": event.previous_hash.hex(), "hash": event.hash.hex()}
    return AuditEventOut(**column_values(event) | hashes)


def _in_utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _canonical_number(text: str) -> int | float:
    """Return a number as jsonb returns it, where 1e22 and 10000000000000000000000 are one number."""
    number = float(text)
    return int(number) if number.is_integer() else number
