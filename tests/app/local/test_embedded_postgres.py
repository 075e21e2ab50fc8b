"""Start, kill, orphan and restart the embedded server as a real process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from app.db.engine import connect
from app.local.embedded_postgres import EmbeddedError, EmbeddedPostgres, copy_template_cluster
from tests.patience import patience
from tests.postgres import initialize, server_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    with server_folder() as folder:
        yield folder / "var"


@pytest.fixture
def postgres(folder: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(folder) as postgres:
        yield postgres


def query(postgres: EmbeddedPostgres, statement: str) -> object:
    engine = connect(postgres.url)
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None
    finally:
        engine.dispose()


def server_pid(folder: Path) -> int:
    return int((folder / "postgres" / "postmaster.pid").read_text().split("\n")[0])


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends_within(pid: int, *, timeout: float = 20.0) -> bool:
    deadline = time.monotonic() + patience(timeout)
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_listens_only_on_a_unix_socket_with_a_short_path(postgres: EmbeddedPostgres) -> None:
    assert query(postgres, "SHOW listen_addresses") == ""
    assert query(postgres, "SHOW server_encoding") == "UTF8"
    socket = Path(postgres.url.partition("host=")[2]) / ".s.PGSQL.5432"
    assert socket.is_socket() and len(str(socket)) < 107


def test_data_survives_a_restart(folder: Path) -> None:
    with EmbeddedPostgres(folder) as postgres:
        query(postgres, "CREATE TABLE kept AS SELECT 7 AS n")
        pid = server_pid(folder)
    assert not is_alive(pid)
    with EmbeddedPostgres(folder) as postgres:
        assert query(postgres, "SELECT n FROM kept") == 7


def test_restart_after_kill_9_keeps_url_and_data(postgres: EmbeddedPostgres, folder: Path) -> None:
    query(postgres, "CREATE TABLE kept AS SELECT 7 AS n")
    url, pid = postgres.url, server_pid(folder)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + patience(10)
    while postgres.is_running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not postgres.is_running
    postgres.start()
    assert postgres.url == url
    assert query(postgres, "SELECT n FROM kept") == 7


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(PR_SET_PDEATHSIG) is of Linux")
def test_server_ends_when_its_parent_is_killed(folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from app.local.embedded_postgres import EmbeddedPostgres\n"
        "postgres = EmbeddedPostgres(Path(sys.argv[1])); postgres.start()\n"
        "sys.stdout.write('started\\n'); sys.stdout.flush(); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
        pid = server_pid(folder)
        parent.kill()
    assert ends_within(pid), "the server outlived its parent"
    with EmbeddedPostgres(folder) as postgres:
        assert query(postgres, "SELECT 1") == 1


def test_start_stops_a_server_left_on_the_same_data(folder: Path) -> None:
    previous = EmbeddedPostgres(folder)
    previous.start()
    query(previous, "CREATE TABLE kept AS SELECT 7 AS n")
    pid = server_pid(folder)
    try:
        with EmbeddedPostgres(folder) as postgres:
            assert server_pid(folder) != pid
            assert query(postgres, "SELECT n FROM kept") == 7
    finally:
        previous.stop()


def test_copied_template_cluster_starts_with_its_data(folder: Path) -> None:
    with EmbeddedPostgres(folder / "template") as template:
        query(template, "CREATE TABLE kept AS SELECT 7 AS n")
    copy_template_cluster(folder / "template", folder / "copy")
    with EmbeddedPostgres(folder / "copy") as postgres:
        assert query(postgres, "SELECT n FROM kept") == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_under_root_runs_in_a_folder_that_nobody_cannot_enter(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with EmbeddedPostgres(closed / "var") as postgres:
        assert query(postgres, "SELECT 7") == 7
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_without_unshare_the_error_names_the_closed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr("app.local.embedded_postgres.shutil.which", lambda _: None)
    with pytest.raises(EmbeddedError, match=f"may not enter .*{closed.name}"):
        EmbeddedPostgres(closed / "var").start()


def test_failed_start_names_the_log_file(folder: Path) -> None:
    with EmbeddedPostgres(folder):
        pass
    (folder / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(EmbeddedError, match=r"postgres\.log"):
        EmbeddedPostgres(folder).start(timeout=10)


def test_url_before_start_is_refused(folder: Path) -> None:
    with pytest.raises(EmbeddedError, match="not running"):
        _ = EmbeddedPostgres(folder).url


def test_tcp_connections_are_refused(postgres: EmbeddedPostgres) -> None:
    port = query(postgres, "SHOW port")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"host=127.0.0.1 port={port} user=emender dbname=emender", connect_timeout=2)


def test_start_leaves_a_process_with_a_reused_pid_alone(folder: Path) -> None:
    with EmbeddedPostgres(initialize(folder / "other")) as other:
        pid = server_pid(folder / "other")
        initialize(folder / "own")
        (folder / "own" / "postgres" / "postmaster.pid").write_text(f"{pid}\n")
        with pytest.raises(EmbeddedError):
            EmbeddedPostgres(folder / "own").start(timeout=10)
        assert query(other, "SELECT 7") == 7
