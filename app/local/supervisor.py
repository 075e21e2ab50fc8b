"""All of the service under one roof: Postgres where there is none, migrations, the API and a worker as processes."""

import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import httpx2
import structlog
from pydantic import SecretStr
from sqlalchemy import select

from app.auth.service import create_key as create_api_key
from app.db.engine import connect, sessions
from app.db.migrate import upgrade
from app.db.models import ApiKey
from app.local.child_process import ends_with_parent
from app.local.embedded_postgres import EmbeddedError, EmbeddedPostgres
from app.observability import logging
from app.settings import Settings, get_settings
from app.signing.keys import SigningKey, SigningKeyUnusable, create_key, key_of
from app.signing.service import note_key

log = structlog.get_logger()

STOP_SECONDS = 15.0  # for a worker to reach the end of its step
MAX_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 60.0  # a process that ran for so long is restarted at once when it dies


class ServeError(Exception):
    """The service cannot be started; the message says why and what to do."""


def serve(settings: Settings, *, embedded: bool, announce: Callable[..., None], workers: int = 1) -> None:
    """Run the service until SIGINT or SIGTERM, then stop all of it.

    `announce` is given the lines for the operator, and by keyword what they tell.

    `workers` may be 0, where workers run elsewhere.

    Raises `ServeError`, or `EmbeddedError`, when it cannot be started; nothing is left running then either.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with Stack(settings, embedded=embedded, workers=workers) as stack:
        announce(f"Emender answers at {stack.url} (documentation: {stack.url}/docs). Ctrl-C stops it.", url=stack.url)
        if stack.first_key is not None:
            line = f"First admin key, also in {stack.key_file}: {stack.first_key}"
            announce(line, key=stack.first_key, key_file=str(stack.key_file))
        while not stopping.wait(0.5):
            stack.watch()
        announce("Stopping.")


class Stack:
    """The running processes; `with Stack(settings, embedded=True) as stack:` from the main thread.

    Entered, the API answers. `watch` is to be called now and then: it restarts what died. Left, all has ended. Secrets
    reach the processes by their environment, never by their command lines.
    """

    def __init__(self, settings: Settings, *, embedded: bool, workers: int = 1) -> None:
        self.settings = settings
        self.workers = workers
        self.first_key: str | None = None
        self._postgres = EmbeddedPostgres(settings.folder) if embedded else None
        self._children: list[Child] = []
        self._lock: TextIO | None = None

    @property
    def url(self) -> str:
        """Where the API answers, as seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.settings.host, self.settings.host)
        return f"http://{host}:{self.settings.port}"

    @property
    def key_file(self) -> Path:
        """Where the first admin key lies, readable by its owner alone."""
        return self.settings.folder / "admin-key"

    def __enter__(self) -> "Stack":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def watch(self) -> None:
        """Start again what died, each process after a pause that doubles as long as it keeps dying."""
        if self._postgres is not None and not self._postgres.running:
            log.warning("Postgres ended; starting it again")
            self._postgres.start()
        for child in self._children:
            child.watch()

    def stop(self) -> None:
        """End every process: the work under way at its next step, then Postgres. Does nothing when none runs."""
        for child in self._children:
            child.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in self._children:
            child.wait(deadline)
        self._children = []
        if self._postgres is not None:
            self._postgres.stop()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start(self) -> None:
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        self._check_port()
        if self._postgres is not None:
            self._lock = _lock(self.settings.folder)
            self._postgres.start()
            self.settings = self.settings.model_copy(
                update={
                    "database_url": SecretStr(self._postgres.url),
                    "webhook_key": self.settings.webhook_key or _kept_secret(self.settings.folder / "webhook-key"),
                }
            )
        if self.settings.database_url is None:
            raise ServeError(
                "EMENDER_DATABASE_URL is not set: set it, or use --embedded to start a Postgres of our own."
            )
        signer = self._find_signer() if self.workers else None
        self._prepare_database(self.settings.database_url.get_secret_value(), signer=signer)
        environment = os.environ | variables(self.settings)
        served = uvicorn("app.main:application", host=self.settings.host, port=self.settings.port)
        api = Child("api", served, environment)
        self._children = [api, *map(self._worker, range(self.workers))]
        for child in self._children:
            child.start()
        self._await_api(api)

    def _worker(self, number: int) -> "Child":
        """A worker; of several, each has its metrics at a port of its own."""
        environment = os.environ | variables(self.settings)
        if self.settings.metrics_port is not None:
            environment["EMENDER_METRICS_PORT"] = str(self.settings.metrics_port + number)
        return Child("worker", ["app.worker.main"], environment)

    def _prepare_database(self, url: str, *, signer: SigningKey | None) -> None:
        engine = connect(url)
        try:
            upgrade(engine)
            with sessions(engine)() as session:
                first = session.scalars(select(ApiKey.id).limit(1)).first() is None
                if first and self._postgres is not None:  # else the operator makes it: our output may be a log
                    _, self.first_key = create_api_key(session, name="first admin", scopes=["admin"], actor="serve")
                    _write_secret(self.key_file, self.first_key)
                if signer is not None:  # so that its public half can be had before the first version is signed
                    note_key(session, key=signer, actor="serve")
                session.commit()
        finally:
            engine.dispose()

    def _find_signer(self) -> SigningKey | None:
        """What our workers will sign with; of the embedded stack, a key that is made on its first start."""
        if self._postgres is not None and self.settings.signing_key_file is None:
            file = self.settings.folder / "signing-key.pem"
            if not file.exists():
                create_key(file)
            self.settings = self.settings.model_copy(update={"signing_key_file": file})
        try:
            return key_of(self.settings.signing_key_file)
        except SigningKeyUnusable as error:
            raise ServeError(error.detail) from None

    def _check_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.settings.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.settings.host, self.settings.port))
            except OSError as error:
                raise ServeError(
                    f"{self.settings.host}:{self.settings.port} cannot be had ({error.strerror}): "
                    "set EMENDER_HOST and EMENDER_PORT to others."
                ) from error

    def _await_api(self, api: "Child", *, timeout: float = 180.0) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not api.running:
                raise ServeError("The API ended while it started; its last lines above say why.")
            try:
                if httpx2.get(f"{self.url}/readyz", timeout=2.0, trust_env=False).is_success:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise ServeError(f"The API did not answer within {timeout:.0f} s.")


class Child:
    """A Python module that runs as a process of ours and is started again when it dies."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.command = [sys.executable, "-m", *arguments]
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._deaths = 0
        self._due: float | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it in a session of its own, so that a Ctrl-C reaches us alone."""
        self._process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )
        self._started, self._due = time.monotonic(), None

    def watch(self) -> None:
        """Start it again once its pause is over, if it died."""
        if self.running or self._process is None:
            return
        now = time.monotonic()
        if self._due is None:
            self._deaths = 1 if now - self._started > HEALTHY_SECONDS else self._deaths + 1
            pause = min(2.0 ** (self._deaths - 1) - 1, MAX_BACKOFF_SECONDS)
            self._due = now + pause
            log.warning("process ended; starting it again", process=self.name, status=self._process.returncode, s=pause)
        if now >= self._due:
            self.start()

    def terminate(self) -> None:
        if self._process is not None and self.running:
            self._process.terminate()

    def wait(self, deadline: float) -> None:
        """Wait for its end until `deadline` (monotonic seconds), then kill it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("process did not end by itself", process=self.name)
            self._process.kill()
            self._process.wait()


def uvicorn(factory: str, *, host: str, port: int) -> list[str]:
    """The arguments of Python with which an application is served."""
    options = ["--no-access-log", "--log-level", "warning", "--timeout-graceful-shutdown", "10"]
    return ["uvicorn", factory, "--factory", "--host", host, "--port", str(port), *options]


def variables(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, from which a child reads the same settings."""
    found = {}
    for name in type(settings).model_fields:
        match getattr(settings, name):
            case None:
                continue
            case SecretStr() as secret:
                text = secret.get_secret_value()
            case Path() as path:
                text = str(path.absolute())
            case tuple() as parts if all(isinstance(part, Path) for part in parts):
                text = ":".join(str(path.absolute()) for path in parts)
            case tuple() as parts:
                text = ",".join(str(part) for part in parts)
            case value:
                text = str(value)
        found[f"EMENDER_{name.upper()}"] = text
    return found


def _lock(folder: Path) -> TextIO:
    """Hold the folder for ourselves; the kernel lets go of it when our process ends, however it does."""
    file = (folder / "serve.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ServeError(
            f"Another `emender serve --embedded` runs in {folder}: stop it, or set EMENDER_FOLDER."
        ) from error
    return file


def _kept_secret(path: Path) -> SecretStr:
    """The secret in the file, which only its owner may read; made where there is none."""
    if not path.exists():
        _write_secret(path, secrets.token_hex(32))
    return SecretStr(path.read_text().strip())


def _write_secret(path: Path, secret: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")


def main() -> int:
    """`python -m app.local.supervisor [--embedded]`, the same as `emender serve`."""
    logging.configure()

    def announce(line: str, **_: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        serve(get_settings(), embedded="--embedded" in sys.argv[1:], announce=announce)
    except (ServeError, EmbeddedError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
