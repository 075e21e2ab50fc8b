"""The audit log: every event carries the hash of the one before, so that a changed or missing row shows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Select, literal_column, or_, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, JsonObject
from app.db.pagination import PageCursor
from app.db.rows import insert_rows
from app.webhooks.subscriptions import announce
from emender.schemas.audit import AuditEventOut, Verification
from emender.schemas.common import Page

GENESIS = bytes(32)
LOCK = 0x61756469  # an advisory lock held to the end of the transaction: events are written one after the other


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
    """Add an event to the caller's transaction; it never holds a secret.

    `before` and `after` are what changed of the target; none where it was not there yet, or is gone. The request's id
    and address are those of the session. Webhooks that asked for it are told: their deliveries are part of the
    transaction.
    """
    event = AuditEvent(
        actor=actor,
        action=action,
        target=target,
        details=details or {},
        before=before,
        after=after,
        reason=reason,
        request_id=session.info.get("request_id"),
        address=session.info.get("address"),
    )
    record_all(session, [event])


def record_all(session: Session, events: Sequence[AuditEvent]) -> None:
    """The same for events of which all but time and place in the chain is said; they follow each other."""
    session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    newest = select(AuditEvent.sequence, AuditEvent.hash).order_by(AuditEvent.sequence.desc()).limit(1)
    sequence, previous = session.execute(newest).one_or_none() or (0, GENESIS)
    for event in events:
        sequence += 1
        event.sequence, event.at, event.previous_hash = sequence, datetime.now(UTC), previous
        previous = event.hash = digest(event)
    columns = AuditEvent.__table__.columns.keys()
    insert_rows(session, AuditEvent, [{name: getattr(event, name) for name in columns} for event in events])
    for event in events:
        announce(session, event)


def digest(event: AuditEvent) -> bytes:
    """sha256 over the event as canonical JSON, its predecessor's hash included.

    What an event does not have is left out, so that events from before there were such columns keep their hashes.
    """
    content = {
        "sequence": event.sequence,
        "at": event.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "actor": event.actor,
        "action": event.action,
        "target": event.target,
        "details": _canonical(event.details),
        "previous": event.previous_hash.hex(),
    }
    for name in ("before", "after", "reason", "request_id", "address"):
        if (value := getattr(event, name)) is not None:
            content[name] = _canonical(value)
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()


@dataclass(frozen=True)
class AuditFilter:
    """Which events are asked for; None lets all through."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    request_id: str | None = None
    edit: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None

    def select(self) -> Select[AuditEvent]:
        query = select(AuditEvent)
        for column, wanted in (
            (AuditEvent.actor, self.actor),
            (AuditEvent.action, self.action),
            (AuditEvent.target, self.target),
            (AuditEvent.request_id, self.request_id),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        if self.edit is not None:
            named = literal_column("details -> 'edits'", JSONB).contains([str(self.edit)])  # as its index has it
            query = query.where(or_(AuditEvent.target == f"edit:{self.edit}", named))
        if self.since is not None:
            query = query.where(AuditEvent.at >= _in_utc(self.since))
        if self.until is not None:
            query = query.where(AuditEvent.at < _in_utc(self.until))
        return query


def list_events(session: Session, *, wanted: AuditFilter, page: PageCursor[int]) -> Page[AuditEventOut]:
    """Newest first."""
    rows, next_cursor = page.fetch(session, wanted.select(), AuditEvent.sequence)
    return Page(items=[_out(row) for row in rows], next=next_cursor)


def all_events(session: Session, *, wanted: AuditFilter) -> Iterator[AuditEventOut]:
    """Every event, oldest first, read as it is asked for."""
    for event in _read(session, wanted.select().order_by(AuditEvent.sequence)):
        yield _out(event)


def verify(session: Session, *, head: str | None = None) -> Verification:
    """Reckon every hash again, from the first event to the last. `head` is the hash, in hex, of an event that must be
    among them: one kept elsewhere shows a log that was cut short, or written anew."""
    count, previous, held = 0, GENESIS, head is None
    for event in _read(session, select(AuditEvent).order_by(AuditEvent.sequence)):
        reason = None
        if event.sequence != count + 1:
            reason = f"event {count + 1} is missing"
        elif event.previous_hash != previous:
            reason = "it does not carry the hash of the event before"
        elif event.hash != digest(event):
            reason = "its content does not have its hash: it was changed"
        if reason is not None:
            return Verification(
                valid=False, events=count, head=_hex(previous, count), broken_at=event.sequence, reason=reason
            )
        count, previous = count + 1, event.hash
        held = held or event.hash.hex() == head
    if not held:
        reason = "no event has the head that was given: the log was cut short or written anew"
        return Verification(valid=False, events=count, head=_hex(previous, count), broken_at=None, reason=reason)
    return Verification(valid=True, events=count, head=_hex(previous, count))


def _read(session: Session, query: Select[AuditEvent]) -> Iterator[AuditEvent]:
    """Through a cursor on the server: the log may be long. What is read does not stay in the session."""
    batches: Iterator[Sequence[AuditEvent]] = session.scalars(query.execution_options(yield_per=500)).partitions()
    for batch in batches:
        for event in batch:
            yield event
            session.expunge(event)


def _out(event: AuditEvent) -> AuditEventOut:
    return AuditEventOut(
        sequence=event.sequence,
        at=event.at,
        actor=event.actor,
        action=event.action,
        target=event.target,
        details=event.details,
        before=event.before,
        after=event.after,
        reason=event.reason,
        request_id=event.request_id,
        address=event.address,
        previous_hash=event.previous_hash.hex(),
        hash=event.hash.hex(),
    )


def _in_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _hex(last: bytes, count: int) -> str | None:
    return last.hex() if count else None


def _canonical(value: Any) -> Any:
    """The value as it comes back from jsonb, where 1e22 and 10000000000000000000000 are one number."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
