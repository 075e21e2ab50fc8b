"""Enqueue deliveries of audit events, in the transaction that records them."""

from collections.abc import Callable
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Edit
from app.webhooks import queries
from app.webhooks.payloads import (
    AliasMoved,
    AliasMovedEvent,
    AnyEvent,
    CheckpointPublished,
    CheckpointPublishedEvent,
    EditEnded,
    EditFailedEvent,
    EditReadyEvent,
    body_of,
)


def enqueue_deliveries(session: Session, audited: AuditEvent) -> None:
    """Enqueue a delivery to each enabled webhook that subscribes to the event. A subscriber of `app.audit.events`."""
    if audited.action not in EVENTS:
        return
    name, make_event = EVENTS[audited.action]
    webhook_ids = queries.find_subscribed(session, event=name)
    if webhook_ids:
        body = body_of(make_event(session, audited))
        queries.add_deliveries(session, webhook_ids=webhook_ids, event=name, body=body)


def _edit_event(session: Session, audited: AuditEvent) -> AnyEvent:
    edit = session.get_one(Edit, UUID(audited.target.removeprefix("edit:")))
    content = {"id": edit.id, "model": edit.model.name, "source": edit.source, "state": edit.state}
    data = EditEnded.model_validate({**content, "problem": edit.problem, "path": f"/v1/edits/{edit.id}"})
    event = EditReadyEvent if edit.state == "ready" else EditFailedEvent
    return event(timestamp=audited.at, data=data)


def _checkpoint_event(_: Session, audited: AuditEvent) -> AnyEvent:
    model, version = audited.target.removeprefix("checkpoint:").rsplit("/", 1)
    path = f"/v1/models/{model}/checkpoints/{version}"
    data = CheckpointPublished(model=model, version=version, commit=audited.details["commit"], path=path)
    return CheckpointPublishedEvent(timestamp=audited.at, data=data)


def _alias_event(_: Session, audited: AuditEvent) -> AnyEvent:
    model, alias = audited.target.removeprefix("alias:").rsplit("/", 1)
    path = f"/v1/models/{model}/aliases/{alias}"
    content = {"model": model, "moved_by": audited.actor, "path": path}
    return AliasMovedEvent(timestamp=audited.at, data=AliasMoved.model_validate(audited.details | content))


EVENTS: dict[str, tuple[str, Callable[[Session, AuditEvent], AnyEvent]]] = {
    "edit.ready": ("edit.ready", _edit_event),
    "edit.failed": ("edit.failed", _edit_event),
    "checkpoint.published": ("checkpoint.published", _checkpoint_event),
    "alias.move": ("alias.moved", _alias_event),
    "alias.delete": ("alias.moved", _alias_event),
}
"""By audit action: the event that webhooks subscribe to, and the function that makes it."""
