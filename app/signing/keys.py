"""Read and create the private key that checkpoints are signed with.

It is an elliptic-curve key in a PEM file (PKCS#8). Only the worker that publishes reads the file.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from editing.errors import EditingError

UNSIGNED: Literal["none"] = "none"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""The curves that OpenSSF Model Signing takes: P-256, P-384 and P-521."""


class SigningKeyUnusable(EditingError):
    """The signing key is missing or malformed. The message never names a folder of the machine."""


@dataclass(frozen=True)
class SigningKey:
    """A private key by its file, and its public half."""

    file: Path
    public_pem: str
    """The SubjectPublicKeyInfo, `-----BEGIN PUBLIC KEY-----`."""

    @property
    def id(self) -> str:
        """The SHA-256 of the public PEM, in hex. It is the `publicKey.hint` of the key's signatures."""
        return hashlib.sha256(self.public_pem.encode()).hexdigest()


def read_key(file: Path) -> SigningKey:
    """Read a private key. Raises `SigningKeyUnusable`."""
    try:
        private = load_pem_private_key(file.read_bytes(), password=None)
    except OSError as error:
        raise SigningKeyUnusable(f"Cannot read the file of EMENDER_SIGNING_KEY_FILE: {error.strerror}.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # their messages may quote the file
        private = None
    if not isinstance(private, EllipticCurvePrivateKey) or private.curve.name not in CURVES:
        raise SigningKeyUnusable(
            "The file of EMENDER_SIGNING_KEY_FILE has no usable EC key (P-256, P-384 or P-521; PEM, PKCS#8, no "
            "password). Create one with `emender signing-key create FILE`."
        )
    return _signing_key(file, private)


def create_key(file: Path) -> SigningKey:
    """Create a P-256 key in a file that only its owner can read. Raises `FileExistsError`; never overwrites."""
    private = generate_private_key(SECP256R1())
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        opened.flush()
        os.fsync(opened.fileno())
    return _signing_key(file, private)


def read_configured_key(setting: Path | Literal["none"] | None) -> SigningKey | None:
    """Read the key that the setting names; None if the setting is `none`. Raises `SigningKeyUnusable`."""
    if setting is None:
        raise SigningKeyUnusable(
            "EMENDER_SIGNING_KEY_FILE is not set. Create a key with `emender signing-key create FILE` and set it to "
            "FILE, or set it to 'none' to publish checkpoints without a signature."
        )
    return None if setting == UNSIGNED else read_key(Path(setting))


def _signing_key(file: Path, private: EllipticCurvePrivateKey) -> SigningKey:
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return SigningKey(file, public.decode())
