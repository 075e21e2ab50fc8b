"""What admins do: read the audit log, make keys, tell receivers of events."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from emender.connection import Connection, at, given
from emender.schemas.audit import AuditEventOut, Verification
from emender.schemas.keys import ApiKeyCreated, ApiKeyOut, Scope
from emender.schemas.webhooks import DeliveryOut, EventType, WebhookCreated, WebhookListed

EXPORTS = {"ndjson": "application/x-ndjson", "csv": "text/csv"}


class Audit:
    """Who changed what, when and why.

    >>> for event in client.audit.list(edit=edit.id):
    ...     print(event.at, event.actor, event.action)
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        request_id: str | None = None,
        edit: UUID | str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[AuditEventOut]:
        """Newest first, page by page as they are asked for."""
        wanted = given(actor=actor, action=action, target=target, request_id=request_id, edit=edit)
        return self._connection.pages(at("audit"), AuditEventOut, **wanted, since=since, until=until)

    def export(self, form: Literal["ndjson", "csv"] = "ndjson", **wanted: Any) -> Iterator[str]:
        """All events, oldest first, line by line as they come; `wanted` as `list` takes it."""
        return self._connection.lines(at("audit"), accept=EXPORTS[form], **wanted)

    def verify(self, *, head: str | None = None) -> Verification:
        """Whether the chain of hashes is whole, and still holds a head that was kept from before."""
        return self._connection.get(at("audit", "verify"), Verification, head=head)


class Keys:
    """API keys.

    >>> client.keys.create("release pipeline", scopes=["read", "apply"]).token
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, name: str, *, scopes: Sequence[Scope], expires_at: datetime | None = None) -> ApiKeyCreated:
        """The answer has the token, and nothing else ever does. It is None where the first answer was lost on the way
        and the call sent again: revoke that key."""
        body = given(name=name, scopes=list(scopes), expires_at=expires_at)
        return self._connection.post(at("keys"), ApiKeyCreated, body)

    def list(self) -> Iterator[ApiKeyOut]:
        """Newest first, the revoked ones too."""
        return self._connection.pages(at("keys"), ApiKeyOut)

    def revoke(self, key_id: UUID | str) -> None:
        """It stays listed, since the audit log names it."""
        self._connection.delete(at("keys", key_id))


class Webhooks:
    """Receivers of signed events.

    >>> made = client.webhooks.create("https://deploy.example/emender", events=["alias.moved"])
    >>> client.webhooks.test(made.id).state
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, url: str, *, events: Sequence[EventType], description: str | None = None) -> WebhookCreated:
        """The answer has the signing secret, and nothing else ever does. It is None where the first answer was lost on
        the way and the call sent again: `rotate` makes another."""
        body = given(url=url, events=list(events), description=description)
        return self._connection.post(at("webhooks"), WebhookCreated, body)

    def list(self) -> Iterator[WebhookListed]:
        """Newest first."""
        return self._connection.pages(at("webhooks"), WebhookListed)

    def get(self, webhook_id: UUID | str) -> WebhookListed:
        return self._connection.get(at("webhooks", webhook_id), WebhookListed)

    def update(
        self,
        webhook_id: UUID | str,
        *,
        url: str | None = None,
        events: Sequence[EventType] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> WebhookListed:
        """What is not given stays."""
        change = given(url=url, events=events and list(events), description=description, enabled=enabled)
        return self._connection.patch(at("webhooks", webhook_id), WebhookListed, change)

    def delete(self, webhook_id: UUID | str) -> None:
        """Its deliveries too."""
        self._connection.delete(at("webhooks", webhook_id))

    def rotate(self, webhook_id: UUID | str) -> WebhookCreated:
        """Another signing secret; for 24 hours deliveries are signed with the one before as well."""
        return self._connection.post(at("webhooks", webhook_id, "rotate"), WebhookCreated)

    def test(self, webhook_id: UUID | str) -> DeliveryOut:
        """Send a `webhook.ping`."""
        return self._connection.post(at("webhooks", webhook_id, "test"), DeliveryOut)

    def deliveries(self, webhook_id: UUID | str) -> Iterator[DeliveryOut]:
        """What was sent or is to be sent, newest first."""
        return self._connection.pages(at("webhooks", webhook_id, "deliveries"), DeliveryOut)

    def delivery(self, webhook_id: UUID | str, delivery_id: UUID | str) -> DeliveryOut:
        return self._connection.get(at("webhooks", webhook_id, "deliveries", delivery_id), DeliveryOut)

    def redeliver(self, webhook_id: UUID | str, delivery_id: UUID | str) -> DeliveryOut:
        """Send a message again under the same id."""
        return self._connection.post(at("webhooks", webhook_id, "deliveries", delivery_id, "redeliver"), DeliveryOut)
