"""The embedded server as a real process: started, killed, left behind, started again."""

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
from app.local.embedded_postgres import EmbeddedError, EmbeddedPostgres


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o711)  # under root the server runs as nobody
    return tmp_path / "var"


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


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_end(pid: int, *, timeout: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_listens_on_a_short_unix_socket_and_nowhere_else(postgres: EmbeddedPostgres) -> None:
    assert query(postgres, "SHOW listen_addresses") == ""
    assert query(postgres, "SHOW server_encoding") == "UTF8"
    socket = Path(postgres.url.partition("host=")[2]) / ".s.PGSQL.5432"
    assert socket.is_socket() and len(str(socket)) < 107


def test_keeps_its_data_over_a_stop(folder: Path) -> None:
    with EmbeddedPostgres(folder) as postgres:
        query(postgres, "CREATE TABLE kept AS SELECT 7 AS n")
        pid = server_pid(folder)
    assert not alive(pid)
    with EmbeddedPostgres(folder) as postgres:
        assert query(postgres, "SELECT n FROM kept") == 7


def test_recovers_from_a_kill_under_the_same_url(postgres: EmbeddedPostgres, folder: Path) -> None:
    query(postgres, "CREATE TABLE kept AS SELECT 7 AS n")
    url, pid = postgres.url, server_pid(folder)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while postgres.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not postgres.running
    postgres.start()
    assert postgres.url == url
    assert query(postgres, "SELECT n FROM kept") == 7


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of their parent's death on Linux")
def test_ends_with_a_starter_that_is_killed(folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from app.local.embedded_postgres import EmbeddedPostgres\n"
        "postgres = EmbeddedPostgres(Path(sys.argv[1])); postgres.start()\n"
        "sys.stdout.write('started\\n'); sys.stdout.flush(); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None and starter.stdout.readline() == b"started\n"
        pid = server_pid(folder)
        starter.kill()
    assert wait_for_end(pid), "the server outlived its starter"
    with EmbeddedPostgres(folder) as postgres:
        assert query(postgres, "SELECT 1") == 1


def test_takes_over_from_a_server_left_behind(folder: Path) -> None:
    left = EmbeddedPostgres(folder)
    left.start()
    query(left, "CREATE TABLE kept AS SELECT 7 AS n")
    pid = server_pid(folder)
    try:
        with EmbeddedPostgres(folder) as postgres:
            assert server_pid(folder) != pid
            assert query(postgres, "SELECT n FROM kept") == 7
    finally:
        left.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the server to another user")
def test_runs_in_a_folder_that_is_closed_to_nobody(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with EmbeddedPostgres(closed / "var") as postgres:
        assert query(postgres, "SELECT 7") == 7
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the server to another user")
def test_says_which_folder_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr("app.local.embedded_postgres.shutil.which", lambda _: None)
    with pytest.raises(EmbeddedError, match=f"may not enter .*{closed.name}"):
        EmbeddedPostgres(closed / "var").start()


def test_says_where_the_log_is_when_it_does_not_start(folder: Path) -> None:
    with EmbeddedPostgres(folder):
        pass
    (folder / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(EmbeddedError, match=r"postgres\.log"):
        EmbeddedPostgres(folder).start(timeout=10)


def test_no_url_before_it_runs(folder: Path) -> None:
    with pytest.raises(EmbeddedError, match="not running"):
        _ = EmbeddedPostgres(folder).url


def test_refuses_tcp(postgres: EmbeddedPostgres) -> None:
    port = query(postgres, "SHOW port")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"host=127.0.0.1 port={port} user=emender dbname=emender", connect_timeout=2)
