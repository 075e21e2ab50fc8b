"""Blobs that change on the disk, and downloads that break off: never a wrong byte."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.db.models import ModelFile
from tests.deploy.conftest import Wire, wire
from tests.faults.conftest import Site
from tests.patience import patience
from tests.servers import environment

__all__ = ["wire"]

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(600)]

WEIGHTS = "text_encoder/model.safetensors"
RESOLVE = "/emender/tiny/resolve"


def flip(content: bytes) -> bytes:
    """One bit, in the tensors: safetensors loads it without a word."""
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def cut(content: bytes) -> bytes:
    return content[:-1]


@pytest.fixture
def published(site: Site) -> dict[str, Any]:
    site.ready_edit("fox")
    return site.publish(edits="ready", alias="production")


def sha256_of(site: Site, path: str) -> str:
    """Of a file that version 1 serves."""
    answer = site.ask("HEAD", f"{RESOLVE}/v1/{path}")
    assert answer.status_code == 200
    return answer.headers["ETag"].strip('"')


@pytest.mark.parametrize("damage", [flip, pytest.param(cut, marks=pytest.mark.long)])
def test_a_damaged_file_is_not_served(
    site: Site, published: dict[str, Any], damage: Callable[[bytes], bytes], outcome: Callable[..., None]
) -> None:
    """Files of the version and of the base model, read a moment ago and so remembered as sound."""
    paths = (WEIGHTS, "manifest.json", "unet/diffusion_pytorch_model.safetensors")
    damaged = {}
    for path in paths:
        assert site.ask("GET", f"{RESOLVE}/production/{path}").status_code == 200
        blob = site.store.path(sha256_of(site, path))
        before = blob.stat()
        blob.write_bytes(damage(blob.read_bytes()))
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
        damaged[path] = blob.name
    for path in paths:
        for headers in ({}, {"Range": "bytes=0-99"}):
            for url in (f"{RESOLVE}/production/{path}", f"/v1/models/tiny/checkpoints/v1/files/{path}"):
                answer = site.ask("GET", url, headers=headers)
                if answer.status_code == 404:  # of the base model, which /v1 does not list
                    assert url.startswith("/v1") and path.startswith("unet")
                    continue
                assert answer.status_code == 500, (url, headers)
                assert answer.headers["Content-Type"] == "application/problem+json"
                assert damaged[path] in answer.json()["detail"]
    assert site.ask("GET", f"{RESOLVE}/production/README.md").status_code == 200

    command = [sys.executable, "-m", "app.cli.main", "storage", "scrub", "--json"]
    scrubbed = subprocess.run(command, env=environment(site.settings), capture_output=True, text=True)
    found = json.loads(scrubbed.stdout)
    assert (scrubbed.returncode, found["missing"]) == (1, [])
    assert {finding["sha256"] for finding in found["damaged"]} == set(damaged.values())

    site.ready_edit("owl")
    version = site.apply(edits="ready", alias="production")
    site.start_worker()
    made = site.await_version(version)
    assert (made["state"], made["problem"]["title"], site.alias()) == ("failed", "Damaged store", "v1")
    what = "a bit flipped in" if damage is flip else "a byte cut from"
    outcome(10, f"{what} three blobs", note="500, `storage scrub` fails, apply fails; alias unmoved")


@pytest.fixture
def big(site: Site, published: dict[str, Any]) -> bytes:
    """16 MB that the model is served with, more than the buffers between two processes hold."""
    content = os.urandom(16 * 10**6)
    with site.sessions() as session:
        model_id, sha256 = site.job_table.model_id, site.store.put(content)
        session.add(ModelFile(model_id=model_id, path="big.bin", sha256=sha256, size=len(content)))
        session.commit()
    return content


def start_download(site: Site, *, count: int) -> tuple[bytes, str]:
    """The first bytes of it and its ETag; then the client is gone."""
    with httpx.stream(
        "GET", f"{site.api.url}{RESOLVE}/v1/big.bin", headers=site.keys["read"], trust_env=False
    ) as answer:
        assert answer.status_code == 200
        received = b""
        for chunk in answer.iter_bytes(65536):
            received += chunk
            if len(received) >= count:
                break
        return received, answer.headers["ETag"]


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)], ids=["client", "server"])
def test_a_cut_download_is_resumed(site: Site, big: bytes, killed: bool, outcome: Callable[..., None]) -> None:
    received, tag = start_download(site, count=10**6)
    assert len(received) < len(big)
    if killed:
        site.api.kill()
        site.api.start()
    headers = {"Range": f"bytes={len(received)}-", "If-Range": tag}
    rest = site.ask("GET", f"{RESOLVE}/v1/big.bin", headers=headers)
    assert rest.status_code == 206
    assert rest.headers["Content-Range"] == f"bytes {len(received)}-{len(big) - 1}/{len(big)}"
    assert hashlib.sha256(received + rest.content).digest() == hashlib.sha256(big).digest()
    who = "the API killed" if killed else "the client cut"
    outcome(20, f"{who} in a download of 16 MB", note=f"206 from byte {len(received)}; the whole is byte-equal")


@pytest.fixture
def server(site: Site) -> Iterator[str]:
    """For `wire`."""
    yield site.api.url


def test_a_snapshot_is_of_one_checkpoint_when_its_alias_moves(
    site: Site, published: dict[str, Any], wire: Wire, tmp_path: Path, outcome: Callable[..., None]
) -> None:
    """By huggingface_hub, through a wire that holds the weights back meanwhile."""
    site.ready_edit("owl")
    other = site.publish(edits="ready")
    wire.pause = WEIGHTS
    code = "import huggingface_hub as h; print(h.snapshot_download('emender/tiny', revision='production'))"
    token = site.keys["read"]["Authorization"].removeprefix("Bearer ")
    given = {"HF_ENDPOINT": wire.url, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": token}
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, env=os.environ | given, stdout=subprocess.PIPE, text=True) as client:
        assert wire.stalled.wait(patience(120))
        assert site.move_alias(other["version"]).status_code == 200
        wire.ended.set()
        output, _ = client.communicate(timeout=patience(240))
    folder = Path(output.strip().splitlines()[-1])
    assert folder.name == published["commit"] != other["commit"]
    expected = {file["path"]: file["sha256"] for file in published["files"]}
    found = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in expected}
    assert found == expected
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in manifest} == manifest
    outcome(20, "an alias moved in the middle of a snapshot", note=f"all {len(manifest)} files are of the first commit")
