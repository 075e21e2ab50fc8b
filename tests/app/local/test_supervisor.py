"""Run the whole stack as a real process; kill each part, stop it and kill it. No process is left running."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import SecretStr

from app.local.child_process import die_with_parent
from app.local.supervisor import ServeError, Stack, to_environment
from app.settings import Settings
from emender import Client
from tests.patience import patience
from tests.postgres import initialize, server_folder
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Served:
    """`emender serve --embedded` on a free port."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            "EMENDER_DATA_DIR": str(folder / "var"),
            "EMENDER_PORT": str(self.port),
            "EMENDER_POLL_INTERVAL_SECONDS": "0.2",
        }
        with (folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli.main", "serve", "--embedded"],
                env=os.environ | given | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=die_with_parent(),
            )

    def lines(self, count: int) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline() for _ in range(count)]

    def children(self) -> dict[str, psutil.Process]:
        """Return the child processes by name: api, worker, postgres."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                command = " ".join(child.cmdline())
            except psutil.Error:
                continue  # the child ended, and the supervisor has not noticed yet
            for name, mark in {
                "api": "app.local.api_process",
                "worker": "app.worker.main",
                "postgres": "bin/postgres",
            }.items():
                if mark in command:
                    found[name] = child
        return found

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).is_success
        except httpx.TransportError:
            return False


@pytest.fixture
def folder() -> Iterator[Path]:
    with server_folder() as folder:
        initialize(folder / "var")
        yield folder


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(**environment: str) -> Served:
        started.append(Served(folder, **environment))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.wait()
        assert served.process.stdout is not None
        served.process.stdout.close()


def wait_until(condition: Callable[[], bool], *, timeout: float = 240.0) -> bool:
    deadline = time.monotonic() + patience(timeout)
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def have_ended(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=patience(60))
    return not alive


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_start_prints_a_key_and_a_signal_stops_all(serve: Callable[..., Served], number: signal.Signals) -> None:
    served = serve()
    up, key = served.lines(2)
    assert f"runs at {served.url} " in up
    token = key.split()[-1]
    file = served.folder / "var" / "admin-key"
    assert file.read_text().strip() == token and stat.S_IMODE(file.stat().st_mode) == 0o600
    with Client(served.url, api_key=token) as client:
        assert list(client.models.list()) == []
    assert set(served.children()) == {"api", "worker", "postgres"}
    for child in descendants(served.process):
        assert token not in " ".join(child.cmdline()) and "postgresql" not in " ".join(child.cmdline())
    children = descendants(served.process)
    signaled_at = time.monotonic()
    served.process.send_signal(number)
    assert served.process.wait(patience(120)) == 0
    assert time.monotonic() - signaled_at < patience(40)
    assert have_ended(children) and not served.is_ready()


def test_first_key_is_printed_only_at_the_first_start(serve: Callable[..., Served]) -> None:
    first = serve()
    key = first.lines(2)[1].split()[-1]
    first.process.terminate()
    assert first.process.wait(patience(60)) == 0
    second = serve()
    second.lines(1)
    with Client(second.url, api_key=key) as client:
        assert list(client.models.list()) == []
    second.process.terminate()
    assert second.process.wait(patience(60)) == 0
    assert second.process.stdout is not None and "key" not in second.process.stdout.read()


def test_killed_processes_are_restarted(serve: Callable[..., Served]) -> None:
    served = serve()
    served.lines(2)
    for name in ("worker", "api", "postgres"):
        old = served.children()[name]
        old.kill()

        def replaced(name: str = name, old: psutil.Process = old) -> bool:
            return served.children().get(name, old) != old

        assert wait_until(replaced), name
    assert wait_until(served.is_ready)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(PR_SET_PDEATHSIG) is of Linux")
def test_kill_9_ends_every_process_and_the_service_starts_again(serve: Callable[..., Served]) -> None:
    served = serve(EMENDER_API_PROCESSES="2")
    served.lines(2)
    children = descendants(served.process)
    served.process.kill()
    served.process.wait()
    assert have_ended(children), "processes outlived their supervisor"
    again = serve()
    assert "runs at" in again.lines(1)[0]


def test_request_in_progress_is_completed_at_shutdown(serve: Callable[..., Served]) -> None:
    """The body is still being sent when the service stops. New connections are refused from then on."""
    served = serve()
    token = served.lines(2)[1].split()[-1]
    body = b'{"name": "late", "scopes": ["read"]}'
    head = f"POST /v1/keys HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:10])
        port = connection.getsockname()[1]
        assert wait_until(
            lambda: any(peer.raddr and peer.raddr.port == port for peer in served.children()["api"].net_connections())
        )
        served.process.terminate()
        assert wait_until(lambda: not served.is_ready(), timeout=60)
        connection.sendall(body[10:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 201 ")
    assert served.process.wait(patience(60)) == 0


def test_a_burst_of_connections_reaches_every_api_process(serve: Callable[..., Served]) -> None:
    served = serve(EMENDER_API_PROCESSES="2")
    served.lines(2)
    with ExitStack() as connections:
        ports = {
            connections.enter_context(socket.create_connection(("127.0.0.1", served.port))).getsockname()[1]
            for _ in range(32)
        }

        def accepted() -> list[int]:
            """Return how many of the connections each process has."""
            apis = [child for child in descendants(served.process) if "app.local.api_process" in child.cmdline()]
            return [sum(bool(c.raddr) and c.raddr.port in ports for c in api.net_connections()) for api in apis]

        assert wait_until(lambda: sum(accepted()) == 32)
        assert len(accepted()) == 2 and min(accepted()) > 0


def test_second_service_in_the_same_folder_is_refused(serve: Callable[..., Served], folder: Path) -> None:
    serve().lines(2)
    second = serve()
    assert second.process.wait(patience(60)) == 1
    assert "Another `emender serve --embedded` runs in" in (folder / "serve.log").read_text()


class TestStack:
    def test_port_in_use_is_refused_before_postgres_starts(self, folder: Path, serve: Callable[..., Served]) -> None:
        served = serve()
        served.lines(1)
        settings = Settings(data_dir=folder / "other", port=served.port)
        with pytest.raises(ServeError, match="Cannot listen: .*EMENDER_PORT"), Stack(settings, embedded=True):
            pass
        assert not (folder / "other" / "postgres").exists()

    def test_missing_database_url_is_refused(self, folder: Path) -> None:
        settings = Settings(data_dir=folder / "var", port=free_port())
        with pytest.raises(ServeError, match="--embedded"), Stack(settings, embedded=False):
            pass


def test_environment_gives_child_processes_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        database_url=SecretStr("postgresql://u:p@h/d"),
        data_dir=tmp_path,
        model_roots=(tmp_path / "a", tmp_path / "b"),
        port=1234,
        lease_seconds=2.5,
    )
    for name, value in to_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
