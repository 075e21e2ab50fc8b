"""A real server on a port of its own, and real clients in fresh processes, since `HF_ENDPOINT` is process-wide."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.serve import variables
from app.settings import Settings
from tests.app.checkpoints.conftest import Service, base_folder, s3_service, service

__all__ = ["base_folder", "s3_service", "service"]

CLIENT = """
import json, sys, warnings
from pathlib import Path
repo, folder = "emender/tiny", Path(sys.argv[1])
"""


@pytest.fixture
def server(service: Service) -> Iterator[str]:
    """The URL of uvicorn serving the service's database and store."""
    with uvicorn(service.settings) as url:
        yield url


@contextmanager
def uvicorn(settings: Settings) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | variables(settings)
    command = [sys.executable, "-m", "uvicorn", "app.main:application", "--factory", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "warning"], env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/readyz").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def pull(server: str, service: Service, tmp_path: Path) -> Callable[..., Any]:
    """Run client code against the server in a fresh process and cache; what it prints last is JSON and comes back."""
    return puller(server, service, tmp_path)


def puller(server: str, service: Service, tmp_path: Path) -> Callable[..., Any]:
    def run(code: str, *, token: str | None = None) -> Any:
        given = token if token is not None else service.keys["read"]["Authorization"].removeprefix("Bearer ")
        environment = {
            **os.environ,
            "HF_ENDPOINT": server,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_TOKEN": given,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", CLIENT + code, str(tmp_path / "pulled")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
