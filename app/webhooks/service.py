"""Webhooks: who is told what; and what became of it."""

from datetime import timedelta
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import JsonObject, Webhook, WebhookDelivery
from app.db.pagination import PageCursor
from app.problems import Unprocessable
from app.settings import Settings
from app.webhooks import queries
from app.webhooks.errors import (
    DeliveryNotFound,
    TooManyWebhooks,
    WebhookDisabled,
    WebhookKeyMissing,
    WebhookNotFound,
)
from app.webhooks.payloads import Ping, PingEvent
from app.webhooks.receivers import ReceiverRefused, check_url, parse
from app.webhooks.signing import WebhookKey, new_salt
from emender.schemas.common import Page
from emender.schemas.webhooks import (
    DeliveryOut,
    WebhookCreate,
    WebhookCreated,
    WebhookListed,
    WebhookOut,
    WebhookUpdate,
)

MAX_WEBHOOKS = 50  # each of them costs a row at each event
OVERLAP = timedelta(hours=24)  # after a rotation the secret before still signs, beside the new one


def create_webhook(session: Session, webhook: WebhookCreate, *, settings: Settings, actor: str) -> WebhookCreated:
    """A new webhook with its secret, which is never shown again.

    Raises `WebhookKeyMissing`, `TooManyWebhooks`, and `Unprocessable` for a URL that is never called.
    """
    key = _key(settings)
    host = _check(webhook.url, settings=settings)
    if queries.count(session) >= MAX_WEBHOOKS:
        raise TooManyWebhooks(MAX_WEBHOOKS)
    row = Webhook(**webhook.model_dump(), key_id=key.id, salt=new_salt(), created_by=actor)
    session.add(row)
    session.flush()
    details = {"host": host, "events": row.events, "description": row.description}
    record(
        session,
        actor=actor,
        action="webhook.create",
        target=_target(row),
        details=details,
        after=_audited(row),
    )
    return _created(row, key)


def list_webhooks(session: Session, *, page: PageCursor[UUID], settings: Settings) -> Page[WebhookListed]:
    rows, next_cursor = page.fetch(session, queries.webhooks(), Webhook.id)
    return Page(items=[_listed(row, settings) for row in rows], next=next_cursor)


def read_webhook(session: Session, *, webhook_id: UUID, settings: Settings) -> WebhookListed:
    return _listed(_webhook(session, webhook_id), settings)


def update_webhook(
    session: Session, *, webhook_id: UUID, update: WebhookUpdate, settings: Settings, actor: str
) -> WebhookListed:
    """Change what is given. Disabling ends what is still to be sent; enabling forgets the failures."""
    row = _webhook(session, webhook_id, lock=True)
    before = _audited(row)
    details: dict[str, object] = update.model_dump(exclude_none=True, exclude={"url"})
    if update.url is not None:
        details["host"], row.url = _check(update.url, settings=settings), update.url
    if update.events is not None:
        row.events = list(update.events)
    if update.description is not None:
        row.description = update.description
    if update.enabled is True:
        row.enabled, row.disabled_reason, row.failing_since = True, None, None
    elif update.enabled is False and row.enabled:
        row.enabled, row.disabled_reason = False, f"Disabled by {actor}."
        session.flush()
        queries.end_pending(session, webhook_id=row.id)
    record(
        session,
        actor=actor,
        action="webhook.update",
        target=_target(row),
        details=details,
        before=before,
        after=_audited(row),
    )
    return _listed(row, settings)


def rotate_secret(session: Session, *, webhook_id: UUID, settings: Settings, actor: str) -> WebhookCreated:
    """Another secret. For 24 hours deliveries carry a signature by the one before as well, if it can still be made."""
    key = _key(settings)
    row = _webhook(session, webhook_id, lock=True)
    same_key = row.key_id == key.id
    row.previous_salt = row.salt if same_key else None
    row.previous_until = session.scalar(select(func.now() + OVERLAP)) if same_key else None
    row.salt, row.key_id = new_salt(), key.id
    record(session, actor=actor, action="webhook.rotate", target=_target(row), details={})
    return _created(row, key)


def delete_webhook(session: Session, *, webhook_id: UUID, actor: str) -> None:
    """Delete it with its deliveries; the audit log keeps that it was there."""
    row = _webhook(session, webhook_id, lock=True)
    # First the audit log's turn, then the deletion: who announces an event locks in this order too.
    record(session, actor=actor, action="webhook.delete", target=_target(row), before=_audited(row))
    session.delete(row)


def list_deliveries(session: Session, *, webhook_id: UUID, page: PageCursor[UUID]) -> Page[DeliveryOut]:
    _webhook(session, webhook_id)
    rows, next_cursor = page.fetch(session, queries.deliveries(webhook_id=webhook_id), WebhookDelivery.id)
    return Page(items=[_delivery_out(row) for row in rows], next=next_cursor)


def read_delivery(session: Session, *, webhook_id: UUID, delivery_id: UUID) -> DeliveryOut:
    _webhook(session, webhook_id)
    return _delivery_out(_delivery(session, webhook_id, delivery_id))


def send_ping(session: Session, *, webhook_id: UUID, actor: str) -> DeliveryOut:
    """Let a `webhook.ping` be sent, whatever events the webhook asked for."""
    row = _enabled(session, webhook_id)
    now = session.scalars(select(func.now())).one()
    event = PingEvent(timestamp=now, data=Ping(webhook=row.id))
    (delivery_id,) = queries.add_deliveries(session, webhook_ids=[row.id], event=event)
    record(session, actor=actor, action="webhook.test", target=_target(row), details={"delivery": str(delivery_id)})
    return _delivery_out(_delivery(session, webhook_id, delivery_id))


def redeliver(session: Session, *, webhook_id: UUID, delivery_id: UUID, actor: str) -> DeliveryOut:
    """Send the same message again, as a delivery of its own: same id, same body, signed anew."""
    row = _enabled(session, webhook_id)
    before = _delivery(session, webhook_id, delivery_id)
    again = WebhookDelivery(
        webhook_id=row.id, message_id=before.message_id, event=before.event, body=before.body, attempts=[]
    )
    session.add(again)
    session.flush()
    details = {"delivery": str(again.id), "of": str(before.id)}
    record(session, actor=actor, action="webhook.redeliver", target=_target(row), details=details)
    return _delivery_out(again)


def _key(settings: Settings) -> WebhookKey:
    if settings.webhook_secret_key is None:
        raise WebhookKeyMissing
    return WebhookKey.of(settings.webhook_secret_key)


def _audited(row: Webhook) -> JsonObject:
    """What of a webhook the audit log keeps: of its URL the host and port, since the rest may hold a secret."""
    return {
        "host": parse(row.url).origin,
        "events": row.events,
        "description": row.description,
        "enabled": row.enabled,
    }


def _check(url: str, *, settings: Settings) -> str:
    """The URL's host and port, which are all of it that the audit log is told: the rest may hold a secret."""
    try:
        return check_url(url, networks=settings.webhook_allowed_networks).origin
    except ReceiverRefused as error:
        raise Unprocessable.at("/url", f"The URL cannot be taken: {error}.") from None


def _webhook(session: Session, webhook_id: UUID, *, lock: bool = False) -> Webhook:
    row = queries.webhook(session, webhook_id=webhook_id, lock=lock)
    if row is None:
        raise WebhookNotFound(webhook_id)
    return row


def _enabled(session: Session, webhook_id: UUID) -> Webhook:
    row = _webhook(session, webhook_id, lock=True)
    if not row.enabled:
        raise WebhookDisabled(webhook_id)
    return row


def _delivery(session: Session, webhook_id: UUID, delivery_id: UUID) -> WebhookDelivery:
    row = queries.delivery(session, delivery_id=delivery_id, webhook_id=webhook_id)
    if row is None:
        raise DeliveryNotFound(delivery_id)
    return row


def _listed(row: Webhook, settings: Settings) -> WebhookListed:
    signable = settings.webhook_secret_key is not None and WebhookKey.of(settings.webhook_secret_key).id == row.key_id
    return WebhookListed(**WebhookOut.model_validate(row).model_dump(), signable=signable)


def _created(row: Webhook, key: WebhookKey) -> WebhookCreated:
    return WebhookCreated(**WebhookOut.model_validate(row).model_dump(), signable=True, secret=key.secret(row.salt))


def _delivery_out(row: WebhookDelivery) -> DeliveryOut:
    return DeliveryOut.model_validate(
        {
            "id": row.id,
            "event": row.event,
            "message_id": row.message_id,
            "state": row.state,
            "tries": row.tries,
            "next_try_at": row.due_at if row.state == "pending" else None,
            "attempts": row.attempts,
            "created_at": row.created_at,
            "ended_at": row.ended_at,
        }
    )


def _target(row: Webhook) -> str:
    return f"webhook:{row.id}"
