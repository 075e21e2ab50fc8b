"""The private key: made once, read by its owner, never shown; and what it signs."""

import json
import stat
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from app.signing.keys import SigningKeyUnusable, create_key, key_of, read_key
from deploy.pull import check_signature, read_keys
from tests.app.cli.test_main import emender


def test_made_once_for_its_owner(tmp_path):
    made = create_key(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert read_key(tmp_path / "key.pem").id == made.id
    with pytest.raises(FileExistsError):
        create_key(tmp_path / "key.pem")
    secret = (tmp_path / "key.pem").read_text().splitlines()[1]
    assert secret not in repr(made) and "private" not in repr(made)


def test_signs_what_the_other_side_verifies(tmp_path):
    made = create_key(tmp_path / "key.pem")
    (tmp_path / "public.pem").write_text(made.public_pem)
    assert check_signature(b"manifest", made.sign(b"manifest"), read_keys([tmp_path / "public.pem"])) == made.id
    assert made.sign(b"manifest") == read_key(tmp_path / "key.pem").sign(b"manifest")
    assert json.loads(made.sign(b"manifest")).keys() == {"algorithm", "key_id", "signature"}


def test_keys_of_openssl(tmp_path):
    """As docker-compose.yml says that one may make it."""
    file = tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", file], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("needs openssl")
    assert read_key(file).public_pem.startswith("-----BEGIN PUBLIC KEY-----")


@pytest.mark.parametrize(
    "content", [None, b"", b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n", "EC"]
)
def test_unusable(tmp_path, content):
    file = tmp_path / "secret-name.pem"
    if content == "EC":
        other = generate_private_key(SECP256R1())
        content = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SigningKeyUnusable) as refused:
        key_of(file)
    assert "EMENDER_SIGNING_KEY_FILE" in refused.value.detail
    assert "secret" not in refused.value.detail


def test_no_key_must_be_asked_for():
    assert key_of("none") is None
    with pytest.raises(SigningKeyUnusable, match="'none'"):
        key_of(None)


def test_commands(tmp_path):
    made = emender("signing-key", "create", str(tmp_path / "key.pem"))
    assert made.returncode == 0 and "PRIVATE" not in made.stdout + made.stderr
    shown = emender("signing-key", "show", EMENDER_SIGNING_KEY_FILE=str(tmp_path / "key.pem"))
    assert (shown.stdout, shown.stderr) == (made.stdout, made.stderr)
    again = emender("signing-key", "create", str(tmp_path / "key.pem"))
    assert again.returncode == 1 and "never overwritten" in again.stderr
    worker = emender("worker", EMENDER_DATABASE_URL="postgresql://127.0.0.1:1/x", EMENDER_DATA_DIR=str(tmp_path))
    assert worker.returncode == 2 and worker.stderr.startswith("EMENDER_SIGNING_KEY_FILE is not set.")
