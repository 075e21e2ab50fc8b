"""A real server on a port of its own, and real clients in fresh processes, since `HF_ENDPOINT` is process-wide."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from tests.app.checkpoints.conftest import Service, base_folder, s3_service, service
from tests.patience import patience
from tests.servers import ApiServer

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
    api = ApiServer(settings, log=settings.data_dir / "api.log")
    api.start()
    try:
        yield api.url
    finally:
        api.stop()


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
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=patience(240), check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
