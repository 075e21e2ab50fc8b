"""Subscribers to audit events. The audit log calls them in the event's transaction and knows none of them by name."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from sqlalchemy.orm import Session

from app.db.models import AuditEvent

Subscriber = Callable[[Session, AuditEvent], None]

SUBSCRIBERS: defaultdict[str, list[Subscriber]] = defaultdict(list)
"""The subscribers by the action of the event."""


def subscribe(subscriber: Subscriber, *, actions: Iterable[str]) -> None:
    """Call `subscriber` with each event of these actions from now on, in the event's transaction."""
    for action in actions:
        if subscriber not in SUBSCRIBERS[action]:
            SUBSCRIBERS[action].append(subscriber)
