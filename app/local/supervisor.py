"""Run the whole service on one machine: Postgres if there is none, migrations, the API and the workers."""

import fcntl
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import httpx2
import structlog
from pydantic import SecretStr
from sqlalchemy import select

from app.auth.service import create_key as create_api_key
from app.db.engine import connect, sessions
from app.db.migrate import upgrade
from app.db.models import ApiKey
from app.local.child_process import ManagedProcess
from app.local.embedded_postgres import EmbeddedPostgres
from app.settings import Settings
from app.signing.keys import SigningKey, SigningKeyUnusable, create_key, read_configured_key
from app.signing.service import record_key

log = structlog.get_logger()

START_SECONDS = 180.0
STOP_SECONDS = 15.0  # for a worker to reach the end of its step


class ServeError(Exception):
    """The service could not be started. The message says why and what to do."""


def serve(settings: Settings, *, embedded: bool, on_message: Callable[..., None], workers: int = 1) -> None:
    """Run the service until SIGINT or SIGTERM, then stop all of it.

    `on_message` receives each line for the operator, and its facts as keywords. `workers=0`: workers run elsewhere.

    Raises `ServeError` or `EmbeddedError` if the service cannot be started. Then no process is left running.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with Stack(settings, embedded=embedded, workers=workers) as stack:
        on_message(f"Emender runs at {stack.url} (documentation: {stack.url}/docs). Ctrl-C stops it.", url=stack.url)
        if stack.first_key is not None:
            line = f"First admin key, also in {stack.key_file}: {stack.first_key}"
            on_message(line, key=stack.first_key, key_file=str(stack.key_file))
        while not stopping.wait(0.5):
            stack.restart_ended()
        on_message("Stopping.")


class Stack:
    """The processes of the service: `with Stack(settings, embedded=True) as stack:` in the main thread.

    Inside the block the API is ready. Call `restart_ended` regularly. At the end all processes have ended.
    """

    def __init__(self, settings: Settings, *, embedded: bool, workers: int = 1) -> None:
        self.settings = settings
        self.workers = workers
        self.first_key: str | None = None
        self._postgres = EmbeddedPostgres(settings.data_dir) if embedded else None
        self._processes: list[ManagedProcess] = []
        self._resources = ExitStack()

    @property
    def url(self) -> str:
        """The URL of the API on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.settings.host, self.settings.host)
        return f"http://{host}:{self.settings.port}"

    @property
    def key_file(self) -> Path:
        """The file of the first admin key. Only its owner may read it."""
        return self.settings.data_dir / "admin-key"

    def __enter__(self) -> "Stack":
        with ExitStack() as resources:
            self._start(resources)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def restart_ended(self) -> None:
        """Restart the processes that ended."""
        if self._postgres is not None and not self._postgres.is_running:
            log.warning("process ended; restarting", process="postgres")
            self._postgres.start()
        for process in self._processes:
            process.restart_if_ended()

    def _start(self, resources: ExitStack) -> None:
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._check_port()
        if self._postgres is not None:
            resources.enter_context(_lock(self.settings.data_dir))
            resources.enter_context(self._postgres)
            self._configure_embedded(self._postgres.url)
        if self.settings.database_url is None:
            raise ServeError("EMENDER_DATABASE_URL is not set: set it, or use --embedded to start a Postgres.")
        self._prepare_database(self.settings.database_url.get_secret_value(), signing_key=self._read_signing_key())
        self._processes = [*self._apis(resources), *map(self._worker, range(self.workers))]
        resources.callback(self._stop_processes)
        for process in self._processes:
            process.start()
        self._wait_for_api()

    def _configure_embedded(self, database_url: str) -> None:
        """Set the database, and create the secrets that an embedded service has from its first start."""
        folder, signing_key_file = self.settings.data_dir, self.settings.signing_key_file
        if self.workers and signing_key_file is None:
            signing_key_file = folder / "signing-key.pem"
            if not signing_key_file.exists():
                create_key(signing_key_file)
        webhook_key = self.settings.webhook_secret_key or _read_or_create_secret(folder / "webhook-key")
        update = {"webhook_secret_key": webhook_key, "signing_key_file": signing_key_file}
        self.settings = self.settings.model_copy(update={"database_url": SecretStr(database_url), **update})

    def _read_signing_key(self) -> SigningKey | None:
        try:
            return read_configured_key(self.settings.signing_key_file) if self.workers else None
        except SigningKeyUnusable as error:
            raise ServeError(error.detail) from None

    def _prepare_database(self, url: str, *, signing_key: SigningKey | None) -> None:
        """Apply the migrations, create the first admin key, and publish the public half of the signing key."""
        engine = connect(url)
        try:
            upgrade(engine)
            with sessions(engine)() as session:
                first = session.scalars(select(ApiKey.id).limit(1)).first() is None
                # With a database of the operator's, the operator creates it: standard output may be a shared log.
                if first and self._postgres is not None:
                    _, self.first_key = create_api_key(session, name="first admin", scopes=["admin"], actor="serve")
                    _write_secret(self.key_file, self.first_key)
                if signing_key is not None:
                    record_key(session, key=signing_key, actor="serve")
                session.commit()
        finally:
            engine.dispose()

    def _apis(self, resources: ExitStack) -> list[ManagedProcess]:
        environment = os.environ | to_environment(self.settings)
        if self.settings.api_processes > 1:  # their metrics are added up
            folder = resources.enter_context(TemporaryDirectory(prefix="emender-metrics-"))
            environment["PROMETHEUS_MULTIPROC_DIR"] = folder
        return [
            ManagedProcess("api", ["app.local.api_process"], environment) for _ in range(self.settings.api_processes)
        ]

    def _worker(self, number: int) -> ManagedProcess:
        """Return a worker. Each of several has a metrics port of its own."""
        environment = os.environ | to_environment(self.settings)
        if self.settings.metrics_port is not None:
            environment["EMENDER_METRICS_PORT"] = str(self.settings.metrics_port + number)
        return ManagedProcess("worker", ["app.worker.main"], environment)

    def _stop_processes(self) -> None:
        """Stop the API and the workers; a worker ends after its current step."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            process.wait(deadline)

    def _check_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.settings.host else socket.AF_INET
        try:
            socket.create_server((self.settings.host, self.settings.port), family=family).close()
        except OSError as error:  # it names the address
            raise ServeError(f"Cannot listen: {error.strerror}. Set EMENDER_HOST or EMENDER_PORT.") from error

    def _wait_for_api(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self._processes[0].is_running:
                raise ServeError("The API ended while it started; its last log lines say why.")
            try:
                if httpx2.get(f"{self.url}/readyz", timeout=2.0, trust_env=False).is_success:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise ServeError(f"The API was not ready within {START_SECONDS:.0f} s.")


def to_environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables from which a child process reads the same settings."""
    values = {f"EMENDER_{name.upper()}": getattr(settings, name) for name in type(settings).model_fields}
    return {name: _to_text(value) for name, value in values.items() if value is not None}


def _to_text(value: object) -> str:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value.absolute())
        case tuple():
            return (":" if value and isinstance(value[0], Path) else ",").join(map(_to_text, value))
    return str(value)


def _lock(folder: Path) -> TextIO:
    """Lock the folder. The kernel releases the lock when this process ends, also after `kill -9`."""
    file = (folder / "serve.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ServeError(
            f"Another `emender serve --embedded` runs in {folder}: stop it, or set EMENDER_DATA_DIR."
        ) from error
    return file


def _read_or_create_secret(path: Path) -> SecretStr:
    if not path.exists():
        _write_secret(path, secrets.token_hex(32))
    return SecretStr(path.read_text().strip())


def _write_secret(path: Path, secret: str) -> None:
    """Write a secret to a file that only its owner may read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")
