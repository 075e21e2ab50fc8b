"""The private key: created once, readable only by its owner, never shown; and its signatures."""

import base64
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256K1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from app.signing.keys import SigningKeyUnusable, create_key, read_configured_key, read_key
from app.worker.signature import sign_files
from tests.app.cli.test_main import emender


def test_a_key_is_created_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    made = create_key(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert read_key(tmp_path / "key.pem") == made
    with pytest.raises(FileExistsError):
        create_key(tmp_path / "key.pem")
    secret = (tmp_path / "key.pem").read_text().splitlines()[1]
    assert secret not in repr(made)


def test_a_signature_is_a_sigstore_bundle_over_the_digests(tmp_path: Path) -> None:
    key = create_key(tmp_path / "key.pem")
    files = {"unet/config.json": "1" * 64, "README.md": "0" * 64}
    bundle = json.loads(sign_files(key, model="tiny", files=files))
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert bundle["verificationMaterial"]["publicKey"]["hint"] == key.id
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["subject"][0]["name"] == "tiny"
    assert statement["predicate"]["serialization"]["ignore_paths"] == ["model.sig", ".cache"]
    assert statement["predicate"]["resources"] == [
        {"name": name, "algorithm": "sha256", "digest": files[name]} for name in sorted(files)
    ]


def test_keys_of_openssl_are_accepted(tmp_path: Path) -> None:
    """By the command that docker-compose.yml names."""
    file = tmp_path / "key.pem"
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(file)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs openssl")
    assert read_key(file).public_pem.startswith("-----BEGIN PUBLIC KEY-----")


def test_keys_on_p384_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(pem(generate_private_key(SECP384R1())))
    assert sign_files(read_key(tmp_path / "key.pem"), model="tiny", files={"README.md": "0" * 64})


def pem(key: Any) -> Any:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n",
        pem(Ed25519PrivateKey.generate()),
        pem(generate_private_key(SECP256K1())),
    ],
)
def test_an_unusable_key_is_refused_without_quoting_it(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "secret-name.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SigningKeyUnusable) as refused:
        read_configured_key(file)
    assert "EMENDER_SIGNING_KEY_FILE" in refused.value.detail
    assert "secret" not in refused.value.detail


def test_a_missing_setting_is_an_error_and_none_is_not() -> None:
    assert read_configured_key("none") is None
    with pytest.raises(SigningKeyUnusable, match="'none'"):
        read_configured_key(None)


def test_the_commands_create_and_show_a_key(tmp_path: Path) -> None:
    made = emender("signing-key", "create", str(tmp_path / "key.pem"))
    assert made.returncode == 0 and "PRIVATE" not in made.stdout + made.stderr
    shown = emender("signing-key", "show", EMENDER_SIGNING_KEY_FILE=str(tmp_path / "key.pem"))
    assert (shown.stdout, shown.stderr) == (made.stdout, made.stderr)
    again = emender("signing-key", "create", str(tmp_path / "key.pem"))
    assert again.returncode == 1 and "never overwritten" in again.stderr
    worker = emender("worker", EMENDER_DATABASE_URL="postgresql://127.0.0.1:1/x", EMENDER_DATA_DIR=str(tmp_path))
    assert worker.returncode == 2 and worker.stderr.startswith("EMENDER_SIGNING_KEY_FILE is not set.")
