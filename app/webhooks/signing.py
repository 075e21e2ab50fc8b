"""Sign deliveries by the Standard Webhooks specification (https://www.standardwebhooks.com, version 1).

A signing secret is derived from the service's webhook key and the webhook's salt, and is never stored: the database
alone cannot sign. A new salt makes a new secret.
"""

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr
from standardwebhooks import Webhook as Signer

PREFIX = "whsec_"
SECRET_BYTES = 32  # the specification asks for 24 to 64


@dataclass(frozen=True)
class WebhookKey:
    """The service's webhook key (`EMENDER_WEBHOOK_SECRET_KEY`), from which the secret of each webhook is derived."""

    key: bytes = field(repr=False)

    @classmethod
    def of(cls, setting: SecretStr) -> "WebhookKey":
        return cls(setting.get_secret_value().encode())

    @property
    def id(self) -> str:
        """16 hex digits that identify the key and reveal nothing else about it."""
        return self._derive(b"", b"emender webhook key id")[:8].hex()

    def secret(self, salt: bytes) -> str:
        """Return the signing secret of this salt in the form for receivers: `whsec_` and base64."""
        return PREFIX + base64.b64encode(self._derive(salt, b"emender webhook secret")).decode()

    def _derive(self, salt: bytes, purpose: bytes) -> bytes:
        """HKDF (RFC 5869) over SHA-256."""
        return HKDF(algorithm=SHA256(), length=SECRET_BYTES, salt=salt, info=purpose).derive(self.key)


def new_salt() -> bytes:
    return secrets.token_bytes(32)


def headers(*, message_id: str, at: datetime, body: str, secrets: Sequence[str]) -> dict[str, str]:
    """Return the three headers of a delivery sent `at` (aware), with a signature by each of the secrets."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(Signer(secret).sign(message_id, at, body) for secret in secrets),
    }
