"""Servers that tests start, kill and start again."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from app.local.child_process import die_with_parent
from app.local.supervisor import to_environment
from app.settings import Settings
from tests.patience import patience


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """For a child: our own variables without our settings, and the given ones; it computes in one thread."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    return own | {"OMP_NUM_THREADS": "1"} | to_environment(settings) | more


class ApiServer:
    """uvicorn with the application on a free port of this machine, which it keeps when it is started again."""

    def __init__(self, settings: Settings, *, log: Path, folder: Path | None = None) -> None:
        """`folder` is where the code lies; None: here."""
        self.settings, self.log, self.folder = settings, log, folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the API was not started"
        return self._process.pid

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "app.main:application", "--factory", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--log-level", "warning", "--no-access-log"],
                env=environment(self.settings),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(),
            )
        deadline = time.monotonic() + patience(120)
        while not self.ready():
            assert self._process.poll() is None, "the API has ended: " + self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, "the API does not answer"
            time.sleep(0.05)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False, verify=False).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """`kill -9`, in the middle of a response."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(patience(30))
            self._process = None


class RedisServer:
    """A redis-server of the test's own, on a free port of this machine; its data is in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--save", "", "--dir", str(self.folder)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent()
        )
        deadline = time.monotonic() + patience(20)
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        """`kill -9`: everything in it is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)


def require_redis() -> None:
    """Skip the test where no redis-server is installed."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs a redis-server on PATH")


def free_port() -> int:
    return free_ports(1)[0]


class S3Server:
    """A SeaweedFS of the test's own, which speaks S3: it checks signatures, and makes buckets on first use."""

    KEY, SECRET = "test-key", "test-secret"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        roles = ("master", "volume", "filer", "s3")
        self._ports = free_ports(2 * len(roles))
        ports = iter(self._ports)
        given: dict[str, str | int] = {f"{role}.port{kind}": next(ports) for role in roles for kind in ("", ".grpc")}
        (self.folder / "blocks").mkdir()
        credentials = {"accessKey": self.KEY, "secretKey": self.SECRET}
        identity = {"name": "test", "credentials": [credentials], "actions": ["Admin", "Read", "Write", "List"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        given |= {"dir": "blocks", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": "s3.json", "s3.iam": "false"}
        given |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "volume.max": 50, "master.volumeSizeLimitMB": 64}
        given |= {"filer.localSocket": "filer.sock", "s3.localSocket": "s3.sock"}
        command = [str(Path(sys.executable).with_name("weed")), "-logtostderr", "server", "-filer", "-s3"]
        with (self.folder / "s3.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *(f"-{name}={value}" for name, value in given.items())],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(signal.SIGKILL),
            )
        self.url = f"http://127.0.0.1:{given['s3.port']}"
        deadline = time.monotonic() + patience(120)
        while time.monotonic() < deadline:
            try:
                if httpx.get(self.url, trust_env=False).status_code == 403:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the S3 server does not answer: " + (self.folder / "s3.log").read_text()[-2000:])

    def kill(self) -> None:
        """`kill -9`: its components wait for each other when they are asked to stop."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in self._ports:  # its sockets are always there
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()

    def settings(self, folder: Path, **given: Any) -> dict[str, Any]:
        """For `Settings`: a store of its own on this server."""
        return {
            "data_dir": folder,
            "store": f"s3://blobs/{secrets.token_hex(8)}",
            "s3_endpoint": self.url,
            "s3_region": "us-east-1",
            "s3_access_key_id": self.KEY,
            "s3_secret_access_key": self.SECRET,
            **given,
        }


def free_ports(count: int) -> list[int]:
    """Different ones: all are held until the last is found."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
