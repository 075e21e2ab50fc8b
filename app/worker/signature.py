"""Sign the files of a checkpoint in the OpenSSF Model Signing format."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from model_signing import hashing, manifest, signing
from model_signing._hashing.hashing import Digest

from app.checkpoints.manifest import SIGNATURE
from app.signing.keys import SigningKey

IGNORED = (SIGNATURE, ".cache")
"""Paths that verifiers skip: the signature itself, and what `hf download` writes beside the files."""


class _KnownDigests(hashing.Config):
    """Give the library the digests of stored blobs, so that it does not hash the files again."""

    def __init__(self, model: str, files: Mapping[str, str]) -> None:
        super().__init__()
        serialization = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": IGNORED}
        )
        items = [
            serialization.new_item(path, Digest("sha256", bytes.fromhex(sha256))) for path, sha256 in files.items()
        ]
        self._manifest = manifest.Manifest(model, items, serialization)

    def hash(self, *_: object, **__: object) -> manifest.Manifest:
        return self._manifest


def sign_files(key: SigningKey, *, model: str, files: Mapping[str, str]) -> bytes:
    """Return the content of `model.sig` for these files, given as paths and SHA-256 digests.

    It is a sigstore bundle with an in-toto statement over the digests. ECDSA is randomized: equal files give another
    signature each time.
    """
    config = signing.Config().use_elliptic_key_signer(private_key=key.file)
    config.set_hashing_config(_KnownDigests(model, files))
    with tempfile.TemporaryDirectory(prefix="emender-signature-") as folder:
        file = Path(folder) / SIGNATURE
        config.sign(model, file)
        return file.read_bytes()
