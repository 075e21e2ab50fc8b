# Written by client/generate_sync.py from emender/_async. Do not edit.
"""For admins: the audit log, API keys and webhooks."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Literal

from emender._sync.connection import Connection
from emender.requests import Id, drop_none, url_path
from emender.schemas.audit import AuditEventOut, Verification
from emender.schemas.keys import ApiKeyCreated, ApiKeyOut, Scope
from emender.schemas.webhooks import DeliveryOut, EventType, WebhookCreated, WebhookListed

EXPORT_TYPES = {"ndjson": "application/x-ndjson", "csv": "text/csv"}


class Audit:
    """The audit log: who changed what, when and why."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        request_id: str | None = None,
        edit: Id | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[AuditEventOut]:
        """List events, newest first."""
        return self._connection.pages(
            url_path("audit"),
            AuditEventOut,
            actor=actor,
            action=action,
            target=target,
            request_id=request_id,
            edit=edit,
            since=since,
            until=until,
        )

    def export(
        self,
        format: Literal["ndjson", "csv"] = "ndjson",
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        request_id: str | None = None,
        edit: Id | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[str]:
        """Iterate over the lines of an export, oldest event first."""
        return self._connection.lines(
            url_path("audit"),
            accept=EXPORT_TYPES[format],
            actor=actor,
            action=action,
            target=target,
            request_id=request_id,
            edit=edit,
            since=since,
            until=until,
        )

    def verify(self, *, head: str | None = None) -> Verification:
        """Verify the chain of hashes. With `head`, also that the log still has that event."""
        return self._connection.get(url_path("audit", "verify"), Verification, head=head)


class Keys:
    """API keys."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, name: str, *, scopes: Sequence[Scope], expires_at: datetime | None = None) -> ApiKeyCreated:
        """Create a key. Its token is returned only once.

        The token is None if the first response was lost and the request was sent again: revoke that key.
        """
        body = drop_none(name=name, scopes=scopes, expires_at=expires_at)
        return self._connection.post(url_path("keys"), ApiKeyCreated, json=body)

    def list(self) -> Iterator[ApiKeyOut]:
        """List keys, newest first, revoked ones included."""
        return self._connection.pages(url_path("keys"), ApiKeyOut)

    def revoke(self, key_id: Id) -> None:
        """Revoke a key. It stays in the list, since the audit log names it."""
        self._connection.delete(url_path("keys", key_id))


class Webhooks:
    """Receivers of signed events."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, url: str, *, events: Sequence[EventType], description: str | None = None) -> WebhookCreated:
        """Create a webhook. Its secret is returned only once.

        The secret is None if the first response was lost and the request was sent again: `rotate` creates another.
        """
        body = drop_none(url=url, events=events, description=description)
        return self._connection.post(url_path("webhooks"), WebhookCreated, json=body)

    def list(self) -> Iterator[WebhookListed]:
        """List webhooks, newest first."""
        return self._connection.pages(url_path("webhooks"), WebhookListed)

    def get(self, webhook_id: Id) -> WebhookListed:
        """Read a webhook."""
        return self._connection.get(url_path("webhooks", webhook_id), WebhookListed)

    def update(
        self,
        webhook_id: Id,
        *,
        url: str | None = None,
        events: Sequence[EventType] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> WebhookListed:
        """Change the fields that are given."""
        change = drop_none(url=url, events=events, description=description, enabled=enabled)
        return self._connection.patch(url_path("webhooks", webhook_id), WebhookListed, change)

    def delete(self, webhook_id: Id) -> None:
        """Delete a webhook and its deliveries."""
        self._connection.delete(url_path("webhooks", webhook_id))

    def rotate(self, webhook_id: Id) -> WebhookCreated:
        """Create another signing secret. For 24 hours, deliveries are signed with the previous one as well."""
        return self._connection.post(url_path("webhooks", webhook_id, "rotate"), WebhookCreated)

    def test(self, webhook_id: Id) -> DeliveryOut:
        """Send a `webhook.ping`."""
        return self._connection.post(url_path("webhooks", webhook_id, "test"), DeliveryOut)

    def deliveries(self, webhook_id: Id) -> Iterator[DeliveryOut]:
        """List deliveries, sent and pending, newest first."""
        return self._connection.pages(url_path("webhooks", webhook_id, "deliveries"), DeliveryOut)

    def delivery(self, webhook_id: Id, delivery_id: Id) -> DeliveryOut:
        """Read a delivery."""
        return self._connection.get(url_path("webhooks", webhook_id, "deliveries", delivery_id), DeliveryOut)

    def redeliver(self, webhook_id: Id, delivery_id: Id) -> DeliveryOut:
        """Send a message again, with the same id."""
        path = url_path("webhooks", webhook_id, "deliveries", delivery_id, "redeliver")
        return self._connection.post(path, DeliveryOut)
