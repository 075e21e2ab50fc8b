"""A real server behind a proxy that records, cuts and alters responses; and a copy of `pull.py`."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.local.child_process import die_with_parent
from app.signing.keys import read_key
from emender import pull
from tests.app.checkpoints.conftest import Service, base_folder, service
from tests.app.conftest import settings
from tests.app.hub.conftest import server
from tests.patience import patience

__all__ = ["base_folder", "server", "service", "settings"]


@dataclass
class Wire:
    """A proxy of a server."""

    port: int
    url: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and `Range` of each GET, in order."""
    tamper: str = ""
    """Flip a bit of this file."""
    cut: dict[str, int] = field(default_factory=dict)
    """Break the connection after this many bytes of a file, once."""
    stall: dict[str, int] = field(default_factory=dict)
    """Send only this many bytes of a file, until `ended` is set."""
    pause: str = ""
    """Send nothing of this file until `ended` is set."""
    stalled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def files(self) -> list[str]:
        """Return the files that were downloaded since the last call."""
        paths = [path.partition("/resolve/")[2].partition("/")[2] for path, _ in self.requests if "/resolve/" in path]
        self.requests.clear()
        return paths

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        if request.command == "GET":
            self.requests.append((request.path, request.headers.get("Range")))
        upstream = http.client.HTTPConnection("127.0.0.1", self.port)
        upstream.request(request.command, request.path, headers=dict(request.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        name = next(
            (name for name in (self.tamper, self.pause, *self.cut, *self.stall) if name and name in request.path), ""
        )
        if content and name and name == self.tamper:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if name and name == self.pause and request.command == "GET":
            self.stalled.set()
            self.ended.wait(patience(60))
        request.send_response_only(answer.status)
        for header, value in answer.getheaders():
            request.send_header(header, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if name in self.cut:
            content = content[: self.cut.pop(name)]
        if name in self.stall:
            request.wfile.write(content[: self.stall[name]])
            request.wfile.flush()
            self.stalled.set()
            self.ended.wait(patience(60))
            return
        request.wfile.write(content)


@pytest.fixture
def wire(server: str) -> Iterator[Wire]:
    wire = Wire(int(server.rpartition(":")[2]))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wire.handle(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        wire.url = f"http://127.0.0.1:{proxy.server_address[1]}"
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield wire
        wire.ended.set()
        proxy.shutdown()
        thread.join()


@dataclass
class Machine:
    """A machine with a copy of `pull.py`, the public key and a folder for checkpoints."""

    script: Path
    key: Path
    folder: Path
    url: str
    environment: dict[str, str]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the copy, apart from our code: with no path to the working directory."""
        command = [sys.executable, "-I", str(self.script), "--endpoint", self.url, "--model", "emender/tiny"]
        command += ["--revision", "production", "--folder", str(self.folder), "--json", *arguments]
        if "--unsigned" not in arguments:
            command += ["--key", str(self.key)]
        ends = die_with_parent()

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in a shell's background
            if ends is not None:
                ends()

        return subprocess.Popen(
            command,
            env=self.environment | environment,
            preexec_fn=prepare,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pull(self, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
        """Return the exit code and the last event."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=patience(120))
        assert out, err
        event: dict[str, Any] = json.loads(out.splitlines()[-1])
        return process.returncode, event

    @property
    def current(self) -> str:
        return os.readlink(self.folder / "current")

    def is_whole(self) -> bool:
        """Return whether `current` has exactly the files that were signed."""
        return pull.verify(self.folder / "current", pull.read_keys([self.key])) is not None


@pytest.fixture
def machine(wire: Wire, service: Service, tmp_path: Path) -> Machine:
    script = tmp_path / "machine" / "pull.py"
    script.parent.mkdir()
    shutil.copyfile(pull.__file__, script)
    key = tmp_path / "machine" / "public.pem"
    file = service.settings.signing_key_file
    assert isinstance(file, Path)
    key.write_text(read_key(file).public_pem)
    token = service.keys["read"]["Authorization"].removeprefix("Bearer ")
    environment = {"PATH": os.environ["PATH"], "EMENDER_API_KEY": token}
    return Machine(script, key, tmp_path / "machine" / "models", wire.url, environment)


@pytest.fixture
def move(service: Service) -> Callable[[str], None]:
    """Point the alias `production` at a version."""

    def put(version: str) -> None:
        url = "/v1/models/tiny/aliases/production"
        headers = {**service.keys["apply"], "If-Match": "*"}
        assert service.client.put(url, json={"version": version}, headers=headers).status_code == 200

    return put


def quoted(path: str) -> str:
    return urllib.parse.quote(path)
