"""The same protocol where the blobs are in a bucket: real clients are sent there, and get the same bytes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
from httpx2 import Response

from app.storage import open_store
from app.storage.s3 import S3Store
from app.storage.store import blob_key
from tests.app.checkpoints.conftest import Service
from tests.app.hub.conftest import puller, uvicorn
from tests.servers import S3Server

URL = "/emender/tiny/resolve"
WEIGHTS = "text_encoder/model.safetensors"


def s3_store(service: Service) -> S3Store:
    assert isinstance(service.store, S3Store)
    return service.store


@pytest.fixture
def published(s3_service: Service) -> dict[str, Any]:
    """v1 (fox), built by a worker whose only store is the bucket."""
    made = s3_service.apply(edits=[str(s3_service.edit("fox"))], alias="production")
    assert made["state"] == "published"
    return made


@pytest.fixture
def ask(s3_service: Service) -> Callable[..., Response]:
    def ask(path: Any, method: str = "GET", url: Any = URL, **headers: Any) -> Any:
        sent = {**s3_service.keys["read"], **headers}
        return s3_service.client.request(method, f"{url}/{path}", headers=sent, follow_redirects=False)

    return ask


def digest_of(published: Any, path: Any = WEIGHTS) -> Any:
    return next(file for file in published["files"] if file["path"] == path)


class TestRedirect:
    @pytest.mark.parametrize("url", [f"{URL}/v1", "/v1/models/tiny/checkpoints/v1/files"])
    def test_large_files_come_from_the_bucket(
        self, ask: Callable[..., Response], published: dict[str, Any], s3_server: S3Server, url: str
    ) -> None:
        file = digest_of(published)
        answer = ask(WEIGHTS, url=url)
        assert answer.status_code == 302
        assert answer.headers["X-Linked-Etag"] == f'"{file["sha256"]}"'
        assert answer.headers["X-Linked-Size"] == str(file["size"])
        assert answer.headers["X-Repo-Commit"] == published["commit"]
        assert "ETag" not in answer.headers and answer.headers["Cache-Control"] == "no-store"
        location = answer.headers["Location"]
        assert location.startswith(s3_server.url) and S3Server.SECRET not in location
        content = httpx.get(location, trust_env=False).content
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        head = ask(WEIGHTS, "HEAD", url=url)
        assert (head.status_code, head.headers["Content-Length"]) == (200, str(file["size"]))
        assert head.headers["ETag"] == head.headers["X-Linked-Etag"] == answer.headers["X-Linked-Etag"]
        assert head.headers["X-Linked-Size"] == str(file["size"])
        assert ask(WEIGHTS, url=url, **{"If-None-Match": head.headers["ETag"]}).status_code == 304
        assert ask(WEIGHTS, url=url, Range="bytes=99999999-").status_code == 416

    def test_small_files_come_from_us(
        self, ask: Callable[..., Response], published: dict[str, Any], s3_service: Service
    ) -> None:
        small = min(published["files"], key=lambda file: file["size"])
        assert small["size"] < 1000
        answer = ask(f"v1/{small['path']}")
        assert (answer.status_code, answer.content) == (200, s3_service.store.read(small["sha256"]))
        assert answer.headers["ETag"] == f'"{small["sha256"]}"'

    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_nobody_is_sent_to_what_is_not_there(
        self, ask: Callable[..., Response], published: dict[str, Any], s3_service: Service, damage: str
    ) -> None:
        file, bucket = digest_of(published), s3_store(s3_service)._bucket
        if damage == "cut":
            obstore.put(bucket, blob_key(file["sha256"]), b"cut")
        else:
            obstore.delete(bucket, blob_key(file["sha256"]))
        for method in ("GET", "HEAD"):
            assert ask(f"v1/{WEIGHTS}", method).status_code == 500


class TestProxied:
    """Where clients cannot reach the bucket, the service sends what it has fetched and checked."""

    @pytest.fixture(autouse=True)
    def unsigned(self, s3_service: Service) -> None:
        settings = s3_service.settings.model_copy(update={"presigned_urls": False})
        vars(s3_service.client.app)["state"].store = open_store(settings)

    def test_whole_and_in_ranges(
        self, ask: Callable[..., Response], published: dict[str, Any], s3_service: Service
    ) -> None:
        file = digest_of(published)
        content = s3_service.store.read(file["sha256"])
        whole = ask(f"v1/{WEIGHTS}")
        assert (whole.status_code, whole.content) == (200, content)
        assert whole.headers["ETag"] == f'"{file["sha256"]}"'
        part = ask(f"v1/{WEIGHTS}", Range="bytes=100-199")
        assert (part.status_code, part.content) == (206, content[100:200])
        head = ask(f"v1/{WEIGHTS}", "HEAD")
        assert head.headers["Content-Length"] == str(len(content)) and "X-Linked-Etag" not in head.headers

    def test_damaged_is_never_sent(
        self, ask: Callable[..., Response], published: dict[str, Any], s3_service: Service
    ) -> None:
        file = digest_of(published)
        content = bytearray(s3_service.store.read(file["sha256"]))
        content[-1] ^= 1
        s3_store(s3_service).local.delete(file["sha256"])
        obstore.put(s3_store(s3_service)._bucket, blob_key(file["sha256"]), bytes(content))
        for headers in ({}, {"Range": "bytes=0-9"}):
            answer = ask(f"v1/{WEIGHTS}", **headers)
            assert answer.status_code == 500 and len(answer.content) < 2000


@pytest.mark.slow
def test_real_clients(s3_service: Service, published: dict[str, Any], s3_server: S3Server, tmp_path: Path) -> None:
    """huggingface_hub downloads, resumes and lists; transformers loads: the weights come by the redirect."""
    with uvicorn(s3_service.settings) as url:
        seen = puller(url, s3_service, tmp_path)(
            """
import hashlib, os
from huggingface_hub import hf_hub_download, get_hf_file_metadata, hf_hub_url, snapshot_download
from transformers import CLIPTextModel
digest = lambda path: hashlib.sha256(Path(path).read_bytes()).hexdigest()
weights = "text_encoder/model.safetensors"
single = hf_hub_download(repo, weights, revision="v1", local_dir=folder / "single")
root = Path(snapshot_download(repo, revision="production", local_dir=folder / "all"))
metadata = get_hf_file_metadata(hf_hub_url(repo, weights, revision="v1"))
_, info = CLIPTextModel.from_pretrained(repo, revision="v1", subfolder="text_encoder", output_loading_info=True)
print(json.dumps({
    "single": digest(single), "missing": sorted(info["missing_keys"]),
    "size": metadata.size, "etag": metadata.etag, "commit": metadata.commit_hash,
    "all": {str(p.relative_to(root)): digest(p) for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts},
}))
"""
        )
    file = digest_of(published)
    assert seen["single"] == seen["etag"] == file["sha256"]
    assert (seen["size"], seen["commit"], seen["missing"]) == (file["size"], published["commit"], [])
    assert {path: seen["all"][path] for path in (own["path"] for own in published["files"])} == {
        own["path"]: own["sha256"] for own in published["files"]
    }
    assert "unet/diffusion_pytorch_model.safetensors" in seen["all"]
    assert file["sha256"] not in s3_store(s3_service).local  # which is where it would be, had the service sent it
