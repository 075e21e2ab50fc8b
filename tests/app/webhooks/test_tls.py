"""Receivers that speak TLS, with certificates of an authority of the test's own."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from standardwebhooks import Webhook as Verifier

from app.db.engine import Sessions
from app.db.models import Webhook
from app.webhooks import connect
from app.webhooks.connect import NotReached, Response, post, tls_context
from app.webhooks.signing import WebhookKey, new_salt
from tests.app.webhooks.conftest import KEY, LOOPBACK, Receiver, receiving
from tests.app.webhooks.test_deliveries import delivery, move

HOST = "hooks.example"


class Authority:
    """A certificate authority; `folder` keeps what it signs."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        certificate = (
            self._builder(self.name, self.key, now - timedelta(days=30), now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self.key, SHA256())
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(self, host: str, *, expired: bool = False) -> Path:
        """A certificate for a name, with its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        end = datetime.now(UTC) + timedelta(days=-1 if expired else 1)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        certificate = (
            self._builder(name, key, end - timedelta(days=5), end)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .sign(self.key, SHA256())
        )
        file = self.folder / f"{host}-{expired}.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.write_bytes(private + certificate.public_bytes(Encoding.PEM))
        return file

    def _builder(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, end: datetime
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder(self.name, name, key.public_key(), x509.random_serial_number(), start, end)
        of_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        of_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return builder.add_extension(of_key, critical=False).add_extension(of_issuer, critical=False)


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Authority]:
    """An authority that this machine trusts by SSL_CERT_FILE. Every name has the address 127.0.0.1."""
    trusted = Authority(tmp_path, "trusted")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted.file))
    monkeypatch.setattr(connect, "resolve", lambda host, port: ["127.0.0.1"])
    tls_context.cache_clear()
    yield trusted
    tls_context.cache_clear()


def call(receiver: Receiver) -> Response:
    return post(receiver.url, headers={}, body=b"{}", networks=LOOPBACK, seconds=10)


def test_a_signed_event_arrives_over_tls(factory: Sessions, authority: Authority, deliver: Callable[..., int]) -> None:
    with receiving(certificate=authority.issue(HOST)) as receiver:
        with factory() as session:
            row = Webhook(url=receiver.url, events=["alias.moved"], created_by="test", secret_salt=new_salt())
            row.key_id = WebhookKey(KEY.encode()).id
            session.add(row)
            session.commit()
        move(factory)
        assert deliver() == 1
    ((headers, body),) = receiver.received
    assert headers["host"].startswith(f"{HOST}:")
    assert Verifier(WebhookKey(KEY.encode()).secret(row.secret_salt)).verify(body, headers)["type"] == "alias.moved"
    assert delivery(factory).state == "delivered"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("authority", "unable to get local issuer certificate"),
        ("name", "Hostname mismatch"),
        ("expired", "certificate has expired"),
        ("none", "WRONG_VERSION_NUMBER"),
    ],
)
def test_a_wrong_certificate_is_refused(authority: Authority, tmp_path: Path, wrong: str, reason: str) -> None:
    """Nothing is sent: the event itself is for the receiver alone."""
    certificates: dict[str, Callable[[], Any]] = {
        "authority": lambda: Authority(tmp_path, "other").issue(HOST),
        "name": lambda: authority.issue("other.example"),
        "expired": lambda: authority.issue(HOST, expired=True),
        "none": lambda: None,
    }
    with receiving(certificate=certificates[wrong]()) as receiver:
        receiver.url = receiver.url.replace("http://127.0.0.1", f"https://{HOST}")
        with pytest.raises(NotReached, match=f"(?i){reason}"):
            call(receiver)
    assert receiver.received == []
