"""`emender verify` and `emender.pull.verify`: every change to a signed folder is found and named."""

import argparse
import ast
import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelInfo
from typer.testing import CliRunner

from app.signing.keys import SigningKey, create_key
from app.worker.signature import sign_files
from emender import pull
from emender.cli.main import app
from emender.pull import PullError, ReleaseDirectory, download, find_changes, read_keys, verify
from tests.patience import patience

FILES = {
    "README.md": b"# card",
    "manifest.json": b"{}",
    "text_encoder/model.safetensors": bytes(range(256)) * 9,
    "unet/config.json": b"{}",
}
WEIGHTS = "text_encoder/model.safetensors"


def write_signature(folder: Path, key: SigningKey) -> None:
    files = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    (folder / "model.sig").write_bytes(sign_files(key, model="tiny", files=files))


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    key = create_key(tmp_path / "private.pem")
    (tmp_path / "public.pem").write_text(key.public_pem)
    return key


@pytest.fixture
def folder(tmp_path: Path, key: SigningKey) -> Path:
    folder = tmp_path / "checkpoint"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    write_signature(folder, key)
    return folder


@pytest.fixture
def problem(folder: Path, tmp_path: Path) -> Callable[[], str]:
    """Return the part of the error after the folder's name, or an empty string."""

    def check() -> str:
        try:
            verify(folder, read_keys([tmp_path / "public.pem"]))
        except PullError as error:
            assert error.code == 6
            return str(error).removeprefix(f"{folder} does not match its model.sig: ").removesuffix(".")
        return ""

    return check


def test_a_folder_as_published_is_accepted(folder: Path, tmp_path: Path, key: SigningKey) -> None:
    assert verify(folder, read_keys([tmp_path / "public.pem"])) == key.id


def test_the_command_of_model_signing_accepts_the_folder_and_refuses_one_changed_byte(
    folder: Path, tmp_path: Path
) -> None:
    """The command needs no options for what `hf download` leaves in the folder."""
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.metadata").touch()
    command: list[str | Path] = [Path(sys.executable).parent / "model_signing", "verify", "key", folder]
    command += ["--signature", folder / "model.sig", "--public_key", tmp_path / "public.pem"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[1000] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Hash mismatch for '{WEIGHTS}'" in done.stderr.replace("\\", "")


def test_one_changed_bit_is_found(folder: Path, problem: Callable[[], str]) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[1000] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert problem() == f"{WEIGHTS}: altered"


def test_missing_and_added_files_are_found(folder: Path, problem: Callable[[], str]) -> None:
    """Only the `.cache` at the top, which huggingface_hub writes, is ignored."""
    (folder / WEIGHTS).rename(folder / "text_encoder" / "pytorch_model.bin")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.metadata").touch()
    (folder / "unet" / ".cache").mkdir()
    (folder / "unet" / ".cache" / "y").touch()
    assert problem() == (f"{WEIGHTS}: missing; text_encoder/pytorch_model.bin: unexpected; unet/.cache/y: unexpected")


def test_a_link_to_a_folder_is_refused(folder: Path, tmp_path: Path, problem: Callable[[], str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    assert "vae" in problem() and "symlink" in problem()


def test_links_to_files_are_accepted(folder: Path, tmp_path: Path, problem: Callable[[], str]) -> None:
    """The cache of huggingface_hub has such links."""
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert problem() == ""


def test_a_file_and_its_digest_altered_together_are_refused(folder: Path, problem: Callable[[], str]) -> None:
    (folder / WEIGHTS).write_bytes(b"other weights")
    bundle = json.loads((folder / "model.sig").read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    resources = statement["predicate"]["resources"]
    for file in resources:
        if file["name"] == WEIGHTS:
            file["digest"] = hashlib.sha256(b"other weights").hexdigest()
    root = hashlib.sha256(b"".join(bytes.fromhex(file["digest"]) for file in resources)).hexdigest()
    statement["subject"][0]["digest"]["sha256"] = root
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / "model.sig").write_text(json.dumps(bundle))
    assert problem() == "InvalidSignature"


@pytest.mark.parametrize(
    "content",
    [None, b"", b"[]", b"[" * 100_000, b"{}", b'{"verificationMaterial": {"publicKey": {"hint": ["x"]}}}', b"\xff"],
)
def test_a_malformed_signature_is_refused(folder: Path, problem: Callable[[], str], content: bytes | None) -> None:
    (folder / "model.sig").unlink()
    if content is not None:
        (folder / "model.sig").write_bytes(content)
    assert problem()


@pytest.mark.parametrize("path", ["mediaType", "dsseEnvelope", "verificationMaterial"])
def test_an_incomplete_signature_is_refused(folder: Path, problem: Callable[[], str], path: str) -> None:
    bundle = json.loads((folder / "model.sig").read_bytes())
    del bundle[path]
    (folder / "model.sig").write_text(json.dumps(bundle))
    assert problem()


def test_another_key_is_refused_also_under_the_id_of_ours(
    folder: Path, tmp_path: Path, key: SigningKey, problem: Callable[[], str]
) -> None:
    other = create_key(tmp_path / "other.pem")
    write_signature(folder, other)
    assert problem() == f"model.sig is by the key {other.id}; trusted keys are {key.id}"
    (folder / "model.sig").write_text((folder / "model.sig").read_text().replace(other.id, key.id))
    assert problem() == "InvalidSignature"


def test_after_a_rotation_both_keys_are_accepted(folder: Path, tmp_path: Path, key: SigningKey) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    newer = create_key(tmp_path / "newer.pem")
    (keys / "1.pem").write_text(key.public_pem)
    (keys / "2.pem").write_text(newer.public_pem)
    for signer in (key, newer):
        write_signature(folder, signer)
        for paths in ([keys], [keys / "2.pem", keys / "1.pem"]):
            assert verify(folder, read_keys(paths)) == signer.id


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b'{"files": 1}'])
def test_without_keys_a_malformed_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(PullError, match="does not match its manifest.json"):
        verify(folder, None)


@pytest.mark.parametrize("signed", [True, False], ids=["signature", "manifest"])
@pytest.mark.parametrize("path", ["../outside.bin", "unet/../../outside.bin", "/outside.bin", "vae/outside.bin"])
def test_a_file_outside_of_the_folder_is_refused(
    folder: Path, tmp_path: Path, key: SigningKey, path: str, signed: bool
) -> None:
    """By `..`, by an absolute path, or through a link to a folder. The digest is that of the file there."""
    (tmp_path / "outside.bin").write_bytes(b"secret")
    name = path.replace("/outside", str(tmp_path / "outside")) if path.startswith("/") else path
    if path.startswith("vae"):
        (folder / "vae").symlink_to(tmp_path)
    files = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items() if path != "manifest.json"}
    files[name] = hashlib.sha256(b"secret").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    if signed:
        files["manifest.json"] = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        (folder / "model.sig").write_bytes(sign_files(key, model="tiny", files=files))
    with pytest.raises(PullError, match="does not match its") as refusal:
        verify(folder, read_keys([tmp_path / "public.pem"]) if signed else None)
    assert refusal.value.code == 6


@pytest.mark.parametrize("path", ["../outside.bin", "unet/../../outside.bin", "/outside.bin"])
def test_a_listed_path_outside_of_the_folder_is_refused_before_the_download(tmp_path: Path, path: str) -> None:
    """No file is linked or downloaded, also if an installed checkpoint seems to have the file."""
    installed, commit = tmp_path / "models" / ("a" * 40), "b" * 40
    installed.mkdir(parents=True)
    (installed / "manifest.json").write_text(json.dumps({"files": {path: "c" * 64}}))
    (tmp_path / "models" / "outside.bin").write_bytes(b"secret")
    listed = {"id": "emender/tiny", "sha": commit, "siblings": [{"rfilename": path, "blobId": "c" * 40}]}
    info = ModelInfo(**listed)  # type: ignore[no-untyped-call]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PullError, match="outside of its folder") as refusal:
        arguments = argparse.Namespace(model="emender/tiny")
        download(ReleaseDirectory(tmp_path / "models", None), HfApi("http://127.0.0.1:9"), arguments, info)
    assert refusal.value.code == 6
    assert sorted(tmp_path.rglob("*")) == before


def test_changes_are_named_without_a_signature(folder: Path) -> None:
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    del digests["manifest.json"]
    assert find_changes(folder, digests) == {}
    changed = digests | {"README.md": "0" * 64, "vae/config.json": "0" * 64}
    del changed["unet/config.json"]
    assert find_changes(folder, changed) == {
        "README.md": "altered",
        "unet/config.json": "unexpected",
        "vae/config.json": "missing",
    }


class TestCommand:
    def test_a_folder_as_published_is_accepted(self, folder: Path, tmp_path: Path, key: SigningKey) -> None:
        done = CliRunner().invoke(app, ["verify", str(folder), "--key", str(tmp_path / "public.pem")])
        assert (done.exit_code, done.stdout) == (0, f"{folder} is as published, signed by {key.id}\n")

    @pytest.mark.parametrize("path", [WEIGHTS, "manifest.json", "model.sig"])
    def test_a_changed_file_is_named(self, folder: Path, tmp_path: Path, path: str) -> None:
        (folder / path).write_bytes((folder / path).read_bytes()[1:])
        command = ["verify", str(folder), "--key", str(tmp_path / "public.pem")]
        done = run(command)
        assert (done.returncode, done.stdout) == (1, "")
        assert path in done.stderr
        done = run([*command, "--json"])
        assert done.returncode == 1
        found = json.loads(done.stdout)
        assert found["verified"] is False and path in found["detail"]

    @pytest.mark.parametrize("name", ["nothing.pem", "private.pem", "checkpoint", ""])
    def test_a_missing_or_private_key_is_wrong_usage(self, folder: Path, tmp_path: Path, name: str) -> None:
        options = ["--key", str(tmp_path / name)] if name else []
        done = run(["verify", str(folder), *options])
        assert (done.returncode, done.stdout) == (2, "")
        assert "public key" in done.stderr
        assert "PRIVATE" not in done.stderr

    def test_a_missing_folder_is_wrong_usage(self, tmp_path: Path) -> None:
        assert CliRunner().invoke(app, ["verify", str(tmp_path / "nothing")]).exit_code == 2


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "emender", *command], capture_output=True, text=True, check=False, timeout=patience(120)
    )


def test_the_puller_needs_only_its_three_packages() -> None:
    """It imports the standard library, huggingface_hub, model-signing and what these require."""
    tree = ast.parse(Path(pull.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert ours == {"cryptography", "filelock", "huggingface_hub", "model_signing"}
    assert (Path(__file__).parents[2] / "deploy" / "pull.py").resolve() == Path(pull.__file__).resolve()


def test_the_puller_runs_where_it_is() -> None:
    """Also beside modules with the names of packages, which the folder of a script puts on the path."""
    script = Path(__file__).parents[2] / "deploy" / "pull.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=False, timeout=patience(120)
    )
    assert done.returncode == 0, done.stderr
    assert "--rollback" in done.stdout


def test_exit_codes_are_those_of_the_command() -> None:
    from emender.cli.errors import ExitCode

    ours: Any = {code.name: code.value for code in pull.ExitCode}
    assert ours.items() <= {code.name: code.value for code in ExitCode}.items()
