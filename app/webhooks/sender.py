"""Send one delivery to its receiver. Holds no database connection."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import editing
from app.db.models import JsonObject
from app.webhooks import signing
from app.webhooks.connect import NotReached, post
from app.webhooks.receivers import Network

MAX_RETRY_AFTER = 3600.0  # a receiver may ask (Retry-After) to be sent nothing for so many seconds


@dataclass(frozen=True)
class Message:
    """A delivery as it is sent."""

    url: str
    message_id: str
    body: str
    secrets: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Attempt:
    """The result of one attempt to send a delivery."""

    sent_at: datetime
    seconds: float
    status: int | None = None
    error: str | None = None
    excerpt: str | None = None
    retry_after: float = 0.0
    """Seconds for which the receiver asks to be sent nothing."""

    @property
    def succeeded(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def as_json(self, *, number: int) -> JsonObject:
        return {
            "number": number,
            "at": self.sent_at.isoformat(),
            "seconds": self.seconds,
            "status": self.status,
            "error": self.error,
            "excerpt": self.excerpt,
        }


def send(message: Message, *, networks: Sequence[Network], seconds: float) -> Attempt:
    """POST the signed message within `seconds`. `networks` may be called besides public addresses."""
    sent_at, started = datetime.now(UTC), time.monotonic()
    headers = {
        "content-type": "application/json",
        "user-agent": f"Emender/{editing.__version__}",
        **signing.headers(message_id=message.message_id, at=sent_at, body=message.body, secrets=message.secrets),
    }
    try:
        response = post(message.url, headers=headers, body=message.body.encode(), networks=networks, seconds=seconds)
    except NotReached as reason:
        return Attempt(sent_at, _since(started), error=str(reason))
    retry_after = response.retry_after if response.status in (429, 503) else None
    return Attempt(
        sent_at,
        _since(started),
        status=response.status,
        excerpt=response.excerpt,
        retry_after=min(retry_after or 0.0, MAX_RETRY_AFTER),
    )


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)
