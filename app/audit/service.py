"""The audit log: every event carries the hash of the one before, so that a changed or missing row shows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, select, text
from sqlalchemy.orm import Session

from app.audit.schemas import AuditEventOut, Verification
from app.db.models import AuditEvent
from app.webhooks.announce import announce

GENESIS = bytes(32)
LOCK = 0x61756469  # an advisory lock held to the end of the transaction: events are written one after the other


def record(session: Session, *, actor: str, action: str, target: str, details: dict[str, Any] | None = None) -> None:
    """Add an event to the caller's transaction; `details` is JSON and never holds a secret.

    Webhooks that asked for it are told: their deliveries are part of the transaction.
    """
    session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    last = session.scalars(select(AuditEvent).order_by(AuditEvent.sequence.desc()).limit(1)).first()
    event = AuditEvent(
        sequence=last.sequence + 1 if last else 1,
        at=datetime.now(UTC),
        actor=actor,
        action=action,
        target=target,
        details=details or {},
        previous_hash=last.hash if last else GENESIS,
    )
    event.hash = digest(event)
    session.add(event)
    session.flush()
    announce(session, event)


def digest(event: AuditEvent) -> bytes:
    """sha256 over the event as canonical JSON, its predecessor's hash included."""
    content = {
        "sequence": event.sequence,
        "at": event.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "actor": event.actor,
        "action": event.action,
        "target": event.target,
        "details": _canonical(event.details),
        "previous": event.previous_hash.hex(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()


@dataclass(frozen=True)
class AuditFilter:
    """Which events are asked for; None lets all through."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    since: datetime | None = None

    def select(self) -> Select[AuditEvent]:
        query = select(AuditEvent)
        for column, wanted in (
            (AuditEvent.actor, self.actor),
            (AuditEvent.action, self.action),
            (AuditEvent.target, self.target),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        if self.since is not None:
            since = self.since if self.since.tzinfo else self.since.replace(tzinfo=UTC)
            query = query.where(AuditEvent.at >= since)
        return query


def list_events(session: Session, *, wanted: AuditFilter, before: int | None, limit: int) -> list[AuditEventOut]:
    """At most `limit` events, newest first, those before the sequence `before` where it is given."""
    query = wanted.select().order_by(AuditEvent.sequence.desc()).limit(limit)
    if before is not None:
        query = query.where(AuditEvent.sequence < before)
    return [_out(event) for event in session.scalars(query)]


def all_events(session: Session, *, wanted: AuditFilter) -> Iterator[AuditEventOut]:
    """Every event, oldest first, read as it is asked for."""
    for event in _read(session, wanted.select().order_by(AuditEvent.sequence)):
        yield _out(event)


def verify(session: Session) -> Verification:
    """Reckon every hash again, from the first event to the last."""
    count, previous = 0, GENESIS
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
        previous_hash=event.previous_hash.hex(),
        hash=event.hash.hex(),
    )


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
