"""The audit log: every event carries the hash of the one before, so that a changed or missing row shows."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from app.db.models import AuditEvent

GENESIS = bytes(32)
LOCK = 0x61756469  # an advisory lock held to the end of the transaction: events are written one after the other


def record(session: Session, *, actor: str, action: str, target: str, details: dict[str, Any] | None = None) -> None:
    """Add an event to the caller's transaction; `details` is JSON and never holds a secret."""
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


def digest(event: AuditEvent) -> bytes:
    """sha256 over the event as canonical JSON, its predecessor's hash included."""
    content = {
        "sequence": event.sequence,
        "at": event.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "actor": event.actor,
        "action": event.action,
        "target": event.target,
        "details": event.details,
        "previous": event.previous_hash.hex(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()
