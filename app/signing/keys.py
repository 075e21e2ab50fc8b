"""The private key that versions are signed with: Ed25519 (RFC 8032) in a PEM file (PKCS#8, RFC 8410).

It is read by the worker that publishes, where it publishes, and is kept nowhere else. What verifies lies in
`deploy.pull`, which needs no library.
"""

import base64
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_pem

from deploy.pull import key_id
from editing.errors import EditingError

UNSIGNED: Literal["none"] = "none"
UNDECIDED = (
    "EMENDER_SIGNING_KEY_FILE is not set. Make a key with `emender signing-key create FILE` and name the file, or set "
    "it to 'none' to publish versions without a signature."
)


class SigningKeyUnusable(EditingError):
    """A signing key that is not there or is none; said without naming the machine's folders."""


@dataclass(frozen=True)
class SigningKey:
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def id(self) -> str:
        """16 hex digits, by which `manifest.sig` names the key."""
        return key_id(self.private.public_key().public_bytes_raw())

    @property
    def public_pem(self) -> str:
        """What verifies: a SubjectPublicKeyInfo, `-----BEGIN PUBLIC KEY-----`."""
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def sign(self, manifest: bytes) -> bytes:
        """The content of `manifest.sig`. Ed25519 draws nothing: the same key and manifest give the same bytes."""
        signature = base64.b64encode(self.private.sign(manifest)).decode()
        content = {"algorithm": "Ed25519", "key_id": self.id, "signature": signature}
        return (json.dumps(content, indent=2) + "\n").encode()


def read_key(file: Path) -> SigningKey:
    """Raises `SigningKeyUnusable`."""
    try:
        private = load_pem(file.read_bytes(), password=None)
    except OSError as error:
        raise SigningKeyUnusable(f"The file of EMENDER_SIGNING_KEY_FILE cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # whose texts might quote the file
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise SigningKeyUnusable(
            "The file of EMENDER_SIGNING_KEY_FILE holds no Ed25519 key (PEM, PKCS#8, without a password): make one "
            "with `emender signing-key create FILE`."
        )
    return SigningKey(private)


def create_key(file: Path) -> SigningKey:
    """A new key, in a file that its owner alone can read. Raises `FileExistsError`: a key is never overwritten."""
    private = Ed25519PrivateKey.generate()
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        opened.flush()
        os.fsync(opened.fileno())
    return SigningKey(private)


def key_of(setting: Path | Literal["none"] | None) -> SigningKey | None:
    """The key that the setting names; None where it asks for versions without a signature. Raises
    `SigningKeyUnusable`, also where it asks for nothing."""
    if setting is None:
        raise SigningKeyUnusable(UNDECIDED)
    return None if setting == UNSIGNED else read_key(Path(setting))
