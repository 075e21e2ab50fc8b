"""`emender verify` and what it stands on: whatever is done to a signed folder is named."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli.main import build_command
from app.signing.keys import SigningKey, create_key
from deploy import pull
from deploy.pull import FORMAT, VerificationFailed, check, read_keys, read_manifest

FILES = {"README.md": b"# card", "text_encoder/model.safetensors": bytes(range(256)) * 9, "unet/config.json": b"{}"}
WEIGHTS = "text_encoder/model.safetensors"


def write_manifest(folder: Path, key: SigningKey, **changes: object) -> None:
    files = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    manifest = {"format": FORMAT, "base_model": {"name": "tiny"}, "files": files} | changes
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sig").write_bytes(key.sign(content))


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    made = create_key(tmp_path / "private.pem")
    (tmp_path / "public.pem").write_text(made.public_pem)
    return made


@pytest.fixture
def folder(tmp_path: Path, key: SigningKey) -> Path:
    folder = tmp_path / "version"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    write_manifest(folder, key)
    return folder


@pytest.fixture
def problems(folder: Path, tmp_path: Path) -> Callable[[], dict[str, str]]:
    return lambda: check(folder, read_keys([tmp_path / "public.pem"])).problems


def test_as_published(folder: Path, tmp_path: Path, key: SigningKey) -> None:
    found = check(folder, read_keys([tmp_path / "public.pem"]))
    assert (found.problems, found.key, found.files) == ({}, key.id, 3)


def test_one_bit_of_a_file(folder: Path, problems: Callable[[], dict[str, str]]) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[1000] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert problems() == {WEIGHTS: "altered"}


def test_missing_and_unlisted(folder: Path, tmp_path: Path, problems: Callable[[], dict[str, str]]) -> None:
    """Of what is added, also a link to a folder; what huggingface_hub leaves is passed over at the top alone."""
    (folder / WEIGHTS).rename(folder / "text_encoder" / "pytorch_model.bin")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.metadata").touch()
    (folder / "unet" / ".cache").mkdir()
    (folder / "unet" / ".cache" / "y").touch()
    (tmp_path / "elsewhere").mkdir()
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    assert problems() == {
        WEIGHTS: "missing",
        "text_encoder/pytorch_model.bin": "unlisted",
        "unet/.cache/y": "unlisted",
        "vae": "unlisted",
    }


def test_links_to_blobs_are_files(folder: Path, tmp_path: Path, problems: Callable[[], dict[str, str]]) -> None:
    """As huggingface_hub lays them out in its cache."""
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert problems() == {}


def test_manifest_and_file_altered_together(folder: Path, problems: Callable[[], dict[str, str]]) -> None:
    """Digests that are right are not enough."""
    (folder / WEIGHTS).write_bytes(b"other weights")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][WEIGHTS] = hashlib.sha256(b"other weights").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert list(problems()) == ["manifest.sig"]
    assert "over manifest.json: one of the two was altered" in problems()["manifest.sig"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing"),
        (b"", "no signature"),
        (b"[" * 100_000, "no signature"),
        (b'{"algorithm": "none", "key_id": "", "signature": ""}', "'none'"),
        (b'{"algorithm": "Ed25519", "key_id": ["x"], "signature": ""}', "trusted are"),
        (b'{"algorithm": "Ed25519", "key_id": "x", "signature": "*"}', "no signature"),
    ],
)
def test_signature_altered(
    folder: Path, problems: Callable[[], dict[str, str]], content: bytes | None, said: str
) -> None:
    (folder / "manifest.sig").unlink()
    if content is not None:
        (folder / "manifest.sig").write_bytes(content)
    assert said in problems()["manifest.sig"]


def test_signed_by_another_under_our_name(folder: Path, tmp_path: Path, problems: Callable[[], dict[str, str]]) -> None:
    other = create_key(tmp_path / "other.pem")
    ours = json.loads((folder / "manifest.sig").read_bytes())["key_id"]
    write_manifest(folder, other)
    assert f"signed by '{other.id}'" in problems()["manifest.sig"]
    forged = json.loads((folder / "manifest.sig").read_bytes()) | {"key_id": ours}
    (folder / "manifest.sig").write_text(json.dumps(forged))
    assert "not the signature of" in problems()["manifest.sig"]


def test_rotated(folder: Path, tmp_path: Path, key: SigningKey) -> None:
    """Versions of the older and of the newer key, with both given one by one, as a folder, or in one file."""
    keys = tmp_path / "keys"
    keys.mkdir()
    newer = create_key(tmp_path / "newer.pem")
    (keys / "1.pem").write_text(key.public_pem)
    (keys / "2.pem").write_text(newer.public_pem)
    (tmp_path / "both.pem").write_text(key.public_pem + newer.public_pem)
    for signer in (key, newer):
        write_manifest(folder, signer)
        for given in ([keys], [tmp_path / "both.pem"], [keys / "2.pem", keys / "1.pem"]):
            assert check(folder, read_keys(given)).key == signer.id


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".", "a\\b", "C:x", "a\0", "manifest.json", ".cache/x"]
)
def test_paths_out_of_the_folder(path: str) -> None:
    content = {"format": FORMAT, "base_model": {"name": "tiny"}, "files": {path: "0" * 64}}
    with pytest.raises(VerificationFailed, match="malformed"):
        read_manifest(json.dumps(content).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b'{"format": 1, "files": {}, "base_model": 0}'])
def test_manifests_that_are_none(content: bytes) -> None:
    with pytest.raises(VerificationFailed, match="no manifest"):
        read_manifest(content)


def test_manifest_of_another_format(folder: Path, key: SigningKey, problems: Callable[[], dict[str, str]]) -> None:
    write_manifest(folder, key, format=1)
    assert "apply the same edits again" in problems()["manifest.json"]


class TestCommand:
    def test_verified(self, folder: Path, tmp_path: Path, key: SigningKey) -> None:
        done = CliRunner().invoke(build_command(), ["verify", str(folder), "--key", str(tmp_path / "public.pem")])
        assert (done.exit_code, done.stdout) == (0, f"3 files as they were published, signed by {key.id}\n")

    @pytest.mark.parametrize(
        ("path", "content", "said"),
        [
            (WEIGHTS, b"", f"{WEIGHTS}: altered"),
            ("manifest.json", None, "manifest.sig: not the signature of KEY over manifest.json: one of"),
            ("manifest.sig", b"{}", "manifest.sig: it is no signature"),
        ],
    )
    def test_tampered(
        self, folder: Path, tmp_path: Path, key: SigningKey, path: str, content: bytes | None, said: str
    ) -> None:
        (folder / path).write_bytes((folder / path).read_bytes() + b" " if content is None else content)
        command = ["verify", str(folder), "--key", str(tmp_path / "public.pem")]
        done = CliRunner().invoke(build_command(), command)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(said.replace("KEY", key.id))
        done = CliRunner().invoke(build_command(), [*command, "--json"])
        assert done.exit_code == 1
        found = json.loads(done.stdout)
        assert found["verified"] is False and list(found["problems"]) == [said.partition(":")[0]]

    @pytest.mark.parametrize("name", ["nothing.pem", "private.pem", "version", ""])
    def test_no_key(self, folder: Path, tmp_path: Path, name: str) -> None:
        """A private key is no public one either, and is not printed."""
        options = ["--key", str(tmp_path / name)] if name else []
        done = CliRunner().invoke(build_command(), ["verify", str(folder), *options])
        assert (done.exit_code, done.stdout) == (2, "")
        assert "public key" in done.stderr
        assert "PRIVATE" not in done.stderr

    def test_no_folder(self, tmp_path: Path) -> None:
        assert CliRunner().invoke(build_command(), ["verify", str(tmp_path / "nothing")]).exit_code == 2


def test_by_the_standard_library_alone() -> None:
    """What the file imports is there wherever Python 3.9 is; its syntax too."""
    import ast
    import sys

    tree = ast.parse(Path(pull.__file__).read_text(), feature_version=(3, 9))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
