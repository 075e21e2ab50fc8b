"""Subscribers to audit events. The audit log emits each event in its transaction and knows no subscriber by name."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from app.db.models import AuditEvent

Subscriber = Callable[[Session, AuditEvent], None]

_subscribers: list[Subscriber] = []


def subscribe(subscriber: Subscriber) -> None:
    """Call `subscriber` with each event from now on, in the event's transaction."""
    if subscriber not in _subscribers:
        _subscribers.append(subscriber)


def emit(session: Session, event: AuditEvent) -> None:
    for subscriber in _subscribers:
        subscriber(session, event)
