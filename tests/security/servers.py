"""The API as a process of its own, to be measured and to be read."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import httpx
import psutil

from app.local.child_process import die_with_parent
from app.local.supervisor import to_environment
from app.settings import Settings
from tests.app.conftest import Headers
from tests.patience import patience
from tests.servers import free_port


@dataclass(frozen=True)
class Server:
    address: tuple[str, int]
    client: httpx.Client
    keys: Mapping[str, Headers]
    process: psutil.Process
    log: Path

    def memory(self) -> int:
        """Bytes that are resident."""
        resident: int = self.process.memory_info().rss
        return resident

    def peak_while(self, work: Callable[[], object]) -> int:
        """The most memory that was seen while `work` ran."""
        done, most = Event(), [self.memory()]

        def watch() -> None:
            while not done.wait(0.01):
                most[0] = max(most[0], self.memory())

        watcher = Thread(target=watch)
        watcher.start()
        try:
            work()
        finally:
            done.set()
            watcher.join()
        return most[0]


@contextmanager
def start_api(settings: Settings, keys: Mapping[str, Headers], *, log: Path, **environment: str) -> Iterator[Server]:
    """uvicorn as `emender serve` starts it."""
    port = free_port()
    given = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    command = [sys.executable, "-m", "uvicorn", "app.main:application", "--factory", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--no-access-log", "--log-level", "warning"],
            env=given | to_environment(settings) | environment,
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent(),
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, trust_env=False) as client:
            deadline = time.monotonic() + patience(120)
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "the server does not answer"
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield Server(("127.0.0.1", port), client, keys, psutil.Process(process.pid), log)
    finally:
        process.terminate()
        process.wait(patience(30))
