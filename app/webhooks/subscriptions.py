"""From audit events to deliveries, in the transaction that changes the state.

`app.audit.service.record` calls this for every event, so that no change of state can be audited and yet not announced.
"""

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
)


def announce(session: Session, audited: AuditEvent) -> None:
    """Add a delivery for each enabled webhook that asked for what the audit event tells of, if that is announced."""
    if audited.action not in ANNOUNCED:
        return
    name, make = ANNOUNCED[audited.action]
    webhook_ids = queries.receivers_of(session, event=name)
    if webhook_ids:
        queries.add_deliveries(session, webhook_ids=webhook_ids, event=make(session, audited))


def _edit(session: Session, audited: AuditEvent) -> AnyEvent:
    edit = session.get_one(Edit, UUID(audited.target.removeprefix("edit:")))
    content = {"id": edit.id, "model": edit.model.name, "source": edit.source, "state": edit.state}
    data = EditEnded.model_validate({**content, "problem": edit.problem, "path": f"/v1/edits/{edit.id}"})
    kind = EditReadyEvent if edit.state == "ready" else EditFailedEvent
    return kind(timestamp=audited.at, data=data)


def _checkpoint(session: Session, audited: AuditEvent) -> AnyEvent:
    model, version = audited.target.removeprefix("checkpoint:").rsplit("/", 1)
    path = f"/v1/models/{model}/checkpoints/{version}"
    data = CheckpointPublished(model=model, version=version, commit=audited.details["commit"], path=path)
    return CheckpointPublishedEvent(timestamp=audited.at, data=data)


def _alias(session: Session, audited: AuditEvent) -> AnyEvent:
    model, alias = audited.target.removeprefix("alias:").rsplit("/", 1)
    path = f"/v1/models/{model}/aliases/{alias}"
    content = {"model": model, "moved_by": audited.actor, "path": path}
    return AliasMovedEvent(timestamp=audited.at, data=AliasMoved.model_validate(audited.details | content))


ANNOUNCED: dict[str, tuple[str, Callable[[Session, AuditEvent], AnyEvent]]] = {
    "edit.ready": ("edit.ready", _edit),
    "edit.failed": ("edit.failed", _edit),
    "checkpoint.published": ("checkpoint.published", _checkpoint),
    "alias.move": ("alias.moved", _alias),
    "alias.delete": ("alias.moved", _alias),
}
"""Audit actions, the events that they are announced as, and what makes those."""
