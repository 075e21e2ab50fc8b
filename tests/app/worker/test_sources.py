"""What is fetched from a hub, against a server that speaks enough of its protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.patience import patience
from tests.servers import free_port

COMMIT = "c" * 40
FILES = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}',
    "README.md": b"not wanted",
    "unet/config.json": b'{"a": 1}',
    "unet/diffusion_pytorch_model.safetensors": b"weights",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"again",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": b"again",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json": b"of those",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "text_encoders/t5xxl.safetensors": b"of another program",
    "code.py": b"print('no')",
    "all-in-one.safetensors": b"the same once more",
    "second_moments.safetensors": b"moments",
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in FILES]
            described = {"id": "some/model", "sha": COMMIT, "siblings": siblings, "cardData": {"license": "openrail++"}}
            self.answer(json.dumps(described).encode())
        elif self.path.startswith("/api/models/"):
            self.answer(b'{"error": "Repository not found"}', status=401)
        elif (name := self.path.removeprefix(f"/some/model/resolve/{COMMIT}/")) in FILES:
            self.answer(FILES[name])
        else:
            self.answer(b"{}", status=404)

    do_HEAD = do_GET

    def answer(self, content: bytes, *, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def obtain(source: str, *, endpoint: str, folder: Path) -> dict[str, object]:
    """`obtain` in a process of its own, since the library reads HF_ENDPOINT when it is imported."""
    program = """
import json, sys
from pathlib import Path
from app.settings import Settings
from app.worker.sources import obtain
from editing.errors import EditingError
steps, found = [], {}
settings = Settings(data_dir=Path(sys.argv[2]))
try:
    with obtain(sys.argv[1], revision=None, settings=settings, progress=lambda *step: steps.append(step)) as source:
        for path in source.folder.rglob("*"):
            if path.is_file() and ".cache" not in path.parts:
                found[path.relative_to(source.folder).as_posix()] = path.read_text()
        result = {"files": found, "commit": source.commit, "license": source.license.id, "steps": steps}
    sys.stdout.write(json.dumps({**result, "left": source.folder.exists()}))
except EditingError as error:
    sys.stdout.write(json.dumps({"detail": error.detail, "pointer": error.pointer, "steps": steps}))
"""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", program, source, str(folder)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=patience(120)
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_configurations_and_safetensors_are_downloaded_at_one_commit(endpoint: str, tmp_path: Path) -> None:
    result = obtain("some/model", endpoint=endpoint, folder=tmp_path)
    assert "files" in result, result
    assert result["files"] == {
        "model_index.json": FILES["model_index.json"].decode(),
        "second_moments.safetensors": "moments",
        "unet/config.json": '{"a": 1}',
        "unet/diffusion_pytorch_model.safetensors": "weights",
    }
    assert (result["commit"], result["license"]) == (COMMIT, "openrail++")
    assert result["steps"] == [[0, 5], [1, 4], [2, 4], [3, 4]]
    assert result["left"] is False and list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_refused_before_its_weights_are_downloaded(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, "model_index.json", b'{"_class_name": "KolorsPipeline"}')
    result = obtain("some/model", endpoint=endpoint, folder=tmp_path)
    detail = str(result["detail"])
    assert "KolorsPipeline" in detail and "FluxPipeline" in detail and "ZImagePipeline" in detail
    assert result["steps"] == [[0, 5]]


def test_a_repository_without_a_pipeline_is_refused(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FILES, "model_index.json")
    result = obtain("some/model", endpoint=endpoint, folder=tmp_path)
    assert "some/model has no model_index.json" in str(result["detail"])


def test_a_missing_repository_is_an_error(endpoint: str, tmp_path: Path) -> None:
    result = obtain("no/such", endpoint=endpoint, folder=tmp_path)
    assert result["pointer"] == "/source" and "private or does not exist" in str(result["detail"])
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_is_an_error(tmp_path: Path) -> None:
    result = obtain("some/model", endpoint=f"http://127.0.0.1:{free_port()}", folder=tmp_path)
    assert "retry" in str(result["detail"])
