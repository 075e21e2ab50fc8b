"""Real Hub clients in environments of their own, against a real server: `make clients`."""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db.models import Model, ModelFile
from app.signing.keys import read_key
from tests.app.checkpoints.conftest import Service
from tests.clients.conftest import Table
from tests.clients.environments import FOLDER, MODEL_SIGNING, NAMES, ClientEnvironment
from tests.deploy.conftest import Wire
from tests.patience import patience

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]
REPO, WEIGHTS = "emender/tiny", "text_encoder/model.safetensors"


@pytest.fixture(params=NAMES)
def client(request: pytest.FixtureRequest) -> ClientEnvironment:
    environment = ClientEnvironment(request.param)
    assert environment.bin.is_dir()
    return environment


@pytest.fixture
def published(service: Service) -> list[dict[str, Any]]:
    """v1 (fox), v2 (fox and owl); `production` at v1."""
    ids = [str(service.edit(source)) for source in ("fox", "owl")]
    return [service.apply(edits=ids[:1], alias="production"), service.apply(edits=ids)]


@pytest.fixture
def environment(service: Service, tmp_path: Path) -> dict[str, str]:
    """The environment of a client's process, without a path to our code."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
    return kept | {"HF_TOKEN": token_of(service), "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}


def token_of(service: Service) -> str:
    return service.keys["read"]["Authorization"].removeprefix("Bearer ")


def test_every_call_of_the_client_passes(
    client: ClientEnvironment,
    server: str,
    service: Service,
    published: list[dict[str, Any]],
    base_folder: Path,
    environment: dict[str, str],
    table: Table,
    tmp_path: Path,
) -> None:
    tree = service.client.get(f"/api/models/{REPO}/revision/v1", params={"blobs": True}, headers=service.keys["read"])
    names = [file["rfilename"] for file in tree.json()["siblings"]]
    contents = {
        name: service.client.get(f"/{REPO}/resolve/v1/{name}", headers=service.keys["read"]).content for name in names
    }
    facts = {
        "repo": REPO,
        "endpoint": server,
        "token": token_of(service),
        "key_name": service.client.get("/api/whoami-v2", headers=service.keys["read"]).json()["fullname"],
        "base": str(base_folder),
        "commits": {checkpoint["version"]: checkpoint["commit"] for checkpoint in published},
        "weights": {
            checkpoint["version"]: next(file["sha256"] for file in checkpoint["files"] if file["path"] == WEIGHTS)
            for checkpoint in published
        },
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    script = shutil.copy(FOLDER / "calls.py", tmp_path)
    command: list[str | Path] = [client.bin / "python", "-W", "ignore", script, json.dumps(facts)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=patience(600))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index('{"version"') :])
    answers = table.setdefault(found["version"], {})
    answers.update({call: problem is None for call, problem in found["calls"].items()})
    assert {call: problem for call, problem in found["calls"].items() if problem} == {}
    assert found["version"].startswith(client.name)


def test_hf_download_gets_a_whole_checkpoint(
    client: ClientEnvironment,
    server: str,
    published: list[dict[str, Any]],
    environment: dict[str, str],
    table: Table,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pulled"
    command: list[str | Path] = [client.bin / "hf", "download", REPO, "--revision", "production", "--local-dir", folder]
    done = subprocess.run(
        command,
        env=environment | {"HF_ENDPOINT": server},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patience(300),
    )
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() if done.returncode == 0 else ""
    right = digest == next(file["sha256"] for file in published[0]["files"] if file["path"] == WEIGHTS)
    table.setdefault(version_of(client), {})["hf download"] = right
    assert right, done.stderr


def test_model_signing_verifies_what_hf_download_pulled(
    client: ClientEnvironment,
    server: str,
    service: Service,
    published: list[dict[str, Any]],
    environment: dict[str, str],
    table: Table,
    tmp_path: Path,
) -> None:
    """Its own command, in an environment without our code, accepts the folder and refuses it with one byte changed."""
    folder, key = tmp_path / "pulled", tmp_path / "public.pem"
    assert isinstance(service.settings.signing_key_file, Path)
    key.write_text(read_key(service.settings.signing_key_file).public_pem)
    download: list[str | Path] = [
        client.bin / "hf",
        "download",
        REPO,
        "--revision",
        "production",
        "--local-dir",
        folder,
    ]
    subprocess.run(
        download,
        env=environment | {"HF_ENDPOINT": server},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=patience(300),
    )
    assert (folder / ".cache").is_dir()  # what hf download leaves there is no obstacle
    command: list[str | Path] = [ClientEnvironment(MODEL_SIGNING).bin / "model_signing", "verify", "key", folder]
    command += ["--signature", folder / "model.sig", "--public_key", key]
    accepted = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=patience(300)
    )
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    refused = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=patience(300)
    )
    right = (accepted.returncode, refused.returncode) == (0, 1)
    table.setdefault(version_of(client), {})["hf download, then model_signing verify"] = right
    assert right, accepted.stderr + refused.stderr
    assert accepted.stdout == "Verification succeeded\n"
    assert "Hash mismatch" in refused.stderr and WEIGHTS in refused.stderr


def test_an_interrupted_download_resumes(
    client: ClientEnvironment,
    wire: Wire,
    service: Service,
    published: list[dict[str, Any]],
    environment: dict[str, str],
    table: Table,
    tmp_path: Path,
) -> None:
    """The connection breaks at 40 of 100 MB. The client requests the rest, at once or when it runs again."""
    content = secrets.token_bytes(100 * 10**6)
    with service.sessions() as session:
        model = session.scalars(select(Model).where(Model.name == "tiny")).one()
        session.add(ModelFile(model_id=model.id, path="big.bin", sha256=service.store.put(content), size=len(content)))
        session.commit()
    wire.cut["big.bin"] = 40 * 10**6
    code = f"import huggingface_hub as h; print(h.hf_hub_download({REPO!r}, 'big.bin', revision='v1', local_dir='.'))"
    command: list[str | Path] = [client.bin / "python", "-W", "ignore", "-c", code]
    given = environment | {"HF_ENDPOINT": wire.url}
    for _ in range(2):
        done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, timeout=patience(300))
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    assert not wire.cut, "the connection was never broken"
    ranges = [asked for path, asked in wire.requests if path.endswith("big.bin") and asked]
    right = (tmp_path / "big.bin").read_bytes() == content and ranges != []
    table.setdefault(version_of(client), {})["an interrupted download resumes"] = right
    assert right
    assert int(ranges[-1].removeprefix("bytes=").partition("-")[0]) > 10**7


def test_snapshot_has_one_commit_while_its_alias_moves(
    client: ClientEnvironment,
    wire: Wire,
    service: Service,
    published: list[dict[str, Any]],
    environment: dict[str, str],
    table: Table,
    tmp_path: Path,
) -> None:
    wire.pause = WEIGHTS
    code = f"import huggingface_hub as h; print(h.snapshot_download({REPO!r}, revision='production', max_workers=1))"
    command: list[str | Path] = [client.bin / "python", "-W", "ignore", "-c", code]
    given = environment | {"HF_ENDPOINT": wire.url}
    with subprocess.Popen(command, env=given, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert wire.stalled.wait(patience(120))
        moved = service.client.put(
            "/v1/models/tiny/aliases/production",
            json={"version": "v2"},
            headers={**service.keys["apply"], "If-Match": "*"},
        )
        assert moved.status_code == 200
        wire.ended.set()
        output, _ = process.communicate(timeout=patience(300))
    folder = Path(output.strip().splitlines()[-1])
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    first = next(file["sha256"] for file in published[0]["files"] if file["path"] == WEIGHTS)
    right = (folder.name, digest) == (published[0]["commit"], first)
    table.setdefault(version_of(client), {})["an alias that moves in between"] = right
    assert right


def version_of(client: ClientEnvironment) -> str:
    lines = client.requirements.read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("huggingface_hub=="))
