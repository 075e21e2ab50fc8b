"""Create, change and delete webhooks, and read and repeat their deliveries."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import JsonObject, Webhook, WebhookDelivery
from app.db.pagination import PageCursor
from app.jobs.queries import latest_jobs
from app.problems import Unprocessable
from app.settings import Settings
from app.webhooks import queries
from app.webhooks.errors import DeliveryNotFound, TooManyWebhooks, WebhookDisabled, WebhookKeyMissing, WebhookNotFound
from app.webhooks.payloads import Ping, PingEvent, body_of
from app.webhooks.receivers import ReceiverInvalid, check_url, parse
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

MAX_WEBHOOKS = 50  # each event adds a delivery for each of them
SECRET_OVERLAP = timedelta(hours=24)  # after a rotation, the previous secret signs too


def create_webhook(session: Session, webhook: WebhookCreate, *, settings: Settings, actor: str) -> WebhookCreated:
    """Create a webhook and return its secret, which is never shown again.

    Raises `WebhookKeyMissing`, `TooManyWebhooks`, and `Unprocessable` if the URL may not be called.
    """
    key = _key(settings)
    _check(webhook.url, settings=settings)
    if queries.count(session) >= MAX_WEBHOOKS:
        raise TooManyWebhooks(MAX_WEBHOOKS)
    row = Webhook(**webhook.model_dump(), key_id=key.id, secret_salt=new_salt(), created_by=actor)
    session.add(row)
    session.flush()
    record(session, actor=actor, action="webhook.create", target=_target(row), after=_audited(row))
    return _created(row, key)


def list_webhooks(session: Session, *, page: PageCursor[UUID], settings: Settings) -> Page[WebhookListed]:
    """List webhooks, newest first."""
    rows, next_cursor = page.fetch(session, queries.webhooks(), Webhook.id)
    return Page(items=[_listed(row, settings) for row in rows], next=next_cursor)


def read_webhook(session: Session, *, webhook_id: UUID, settings: Settings) -> WebhookListed:
    return _listed(_webhook(session, webhook_id), settings)


def update_webhook(
    session: Session, *, webhook_id: UUID, update: WebhookUpdate, settings: Settings, actor: str
) -> WebhookListed:
    """Change a webhook. Disabling it ends its pending deliveries; enabling it resets its failures."""
    row = _webhook(session, webhook_id, lock=True)
    before = _audited(row)
    if update.url is not None:
        _check(update.url, settings=settings)
    for name, value in update.model_dump(exclude_none=True, exclude={"enabled"}).items():
        setattr(row, name, value)
    if update.enabled is True:
        row.enabled, row.disabled_reason, row.failing_since, row.paused_until = True, None, None, None
    elif update.enabled is False and row.enabled:
        row.enabled, row.disabled_reason = False, f"Disabled by {actor}."
        session.flush()
        queries.end_pending(session, webhook_id=row.id)
    record(session, actor=actor, action="webhook.update", target=_target(row), before=before, after=_audited(row))
    return _listed(row, settings)


def rotate_secret(session: Session, *, webhook_id: UUID, settings: Settings, actor: str) -> WebhookCreated:
    """Replace the secret. For 24 hours deliveries are signed with the previous one too, if its key is still known."""
    key = _key(settings)
    row = _webhook(session, webhook_id, lock=True)
    same_key = row.key_id == key.id
    row.previous_secret_salt = row.secret_salt if same_key else None
    row.previous_secret_expires_at = session.scalar(select(func.now() + SECRET_OVERLAP)) if same_key else None
    row.secret_salt, row.key_id = new_salt(), key.id
    record(session, actor=actor, action="webhook.rotate", target=_target(row))
    return _created(row, key)


def delete_webhook(session: Session, *, webhook_id: UUID, actor: str) -> None:
    """Delete a webhook with its deliveries. The audit log keeps its creation and deletion."""
    row = _webhook(session, webhook_id, lock=True)
    # The audit log is locked before the deletion, as by transactions that enqueue deliveries.
    record(session, actor=actor, action="webhook.delete", target=_target(row), before=_audited(row))
    queries.end_pending(session, webhook_id=row.id)
    session.delete(row)


def list_deliveries(session: Session, *, webhook_id: UUID, page: PageCursor[UUID]) -> Page[DeliveryOut]:
    """List the deliveries of a webhook, newest first."""
    _webhook(session, webhook_id)
    rows, next_cursor = page.fetch(session, queries.deliveries(webhook_id=webhook_id), WebhookDelivery.id)
    return Page(items=_deliveries_out(session, rows), next=next_cursor)


def read_delivery(session: Session, *, webhook_id: UUID, delivery_id: UUID) -> DeliveryOut:
    _webhook(session, webhook_id)
    return _deliveries_out(session, [_delivery(session, webhook_id, delivery_id)])[0]


def send_ping(session: Session, *, webhook_id: UUID, actor: str) -> DeliveryOut:
    """Enqueue a `webhook.ping`, to which every webhook subscribes."""
    row = _enabled(session, webhook_id)
    event = PingEvent(timestamp=session.scalars(select(func.now())).one(), data=Ping(webhook=row.id))
    ids = queries.add_deliveries(session, webhook_ids=[row.id], event=event.type, body=body_of(event))
    return _record_delivery(session, row, ids[0], action="webhook.test", actor=actor)


def redeliver(session: Session, *, webhook_id: UUID, delivery_id: UUID, actor: str) -> DeliveryOut:
    """Enqueue a message again as a new delivery, with the same id and body, and a new signature."""
    row = _enabled(session, webhook_id)
    sent = _delivery(session, webhook_id, delivery_id)
    ids = queries.add_deliveries(
        session, webhook_ids=[row.id], event=sent.event, body=sent.body, message_id=sent.message_id
    )
    return _record_delivery(session, row, ids[0], action="webhook.redeliver", actor=actor, of=str(sent.id))


def _record_delivery(
    session: Session, row: Webhook, delivery_id: UUID, *, action: str, actor: str, **details: str
) -> DeliveryOut:
    details = {"delivery": str(delivery_id), **details}
    record(session, actor=actor, action=action, target=_target(row), details=details)
    return read_delivery(session, webhook_id=row.id, delivery_id=delivery_id)


def _key(settings: Settings) -> WebhookKey:
    if settings.webhook_secret_key is None:
        raise WebhookKeyMissing
    return WebhookKey.of(settings.webhook_secret_key)


def _check(url: str, *, settings: Settings) -> None:
    try:
        check_url(url, networks=settings.webhook_allowed_networks)
    except ReceiverInvalid as error:
        raise Unprocessable.at("/url", f"The URL is refused: {error}.") from None


def _webhook(session: Session, webhook_id: UUID, *, lock: bool = False) -> Webhook:
    row = queries.find_webhook(session, webhook_id=webhook_id, lock=lock)
    if row is None:
        raise WebhookNotFound(webhook_id)
    return row


def _enabled(session: Session, webhook_id: UUID) -> Webhook:
    row = _webhook(session, webhook_id, lock=True)
    if not row.enabled:
        raise WebhookDisabled(webhook_id)
    return row


def _delivery(session: Session, webhook_id: UUID, delivery_id: UUID) -> WebhookDelivery:
    row = queries.find_delivery(session, delivery_id=delivery_id)
    if row is None or row.webhook_id != webhook_id:
        raise DeliveryNotFound(delivery_id)
    return row


def _listed(row: Webhook, settings: Settings) -> WebhookListed:
    signable = settings.webhook_secret_key is not None and _key(settings).id == row.key_id
    return WebhookListed(**WebhookOut.model_validate(row).model_dump(), signable=signable)


def _created(row: Webhook, key: WebhookKey) -> WebhookCreated:
    out = WebhookOut.model_validate(row).model_dump()
    return WebhookCreated(**out, signable=True, secret=key.secret(row.secret_salt))


def _deliveries_out(session: Session, rows: Sequence[WebhookDelivery]) -> list[DeliveryOut]:
    jobs = latest_jobs(session, [row.id for row in rows])
    return [
        DeliveryOut(
            id=row.id,
            event=row.event,
            message_id=row.message_id,
            state=row.state,
            tries=jobs[row.id].attempt,
            next_try_at=jobs[row.id].due_at if row.state == "pending" else None,
            attempts=row.attempts,
            created_at=row.created_at,
            ended_at=jobs[row.id].finished_at,
        )
        for row in rows
    ]


def _audited(row: Webhook) -> JsonObject:
    """Return the fields for the audit log; of the URL only host and port, since the rest may hold a secret."""
    return {"host": parse(row.url).origin, "events": row.events, "description": row.description, "enabled": row.enabled}


def _target(row: Webhook) -> str:
    return f"webhook:{row.id}"
