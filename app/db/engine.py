"""The database engine and its sessions: sync SQLAlchemy over psycopg 3, the same for API and worker."""

from select import POLLIN, poll
from typing import Any

from psycopg import Connection
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import Session, sessionmaker

Sessions = sessionmaker[Session]


def parse_database_url(url: str) -> URL:
    """Parse `postgresql://…` or `postgres://…`, with psycopg 3 as the driver."""
    return make_url(url).set(drivername="postgresql+psycopg")


def connect(
    url: str, *, pool_size: int = 10, idle_seconds: float | None = None, lock_seconds: float | None = None
) -> Engine:
    """Create an engine that replaces broken connections, so that a restart of Postgres costs one reconnect.

    Errors show statements without their values, which do not belong in logs. Postgres ends a transaction that is idle
    for `idle_seconds`, and releases its locks: its process may be frozen. A statement that waits longer than
    `lock_seconds` for a lock fails with psycopg's `LockNotAvailable`.
    """
    parsed = parse_database_url(url)
    # Plan for the values at hand: a generic plan reads a million edits to list the few with a rare value.
    options = f"{parsed.query.get('options', '')} -c plan_cache_mode=force_custom_plan"
    if idle_seconds is not None:
        options += f" -c idle_in_transaction_session_timeout={round(idle_seconds * 1000)}"
    if lock_seconds is not None:
        options += f" -c lock_timeout={round(lock_seconds * 1000)}"
    engine = create_engine(
        parsed, pool_size=pool_size, max_overflow=10, hide_parameters=True, connect_args={"options": options}
    )
    event.listen(engine, "checkout", _replace_closed_connection)
    return engine


def _replace_closed_connection(connection: Connection[Any], *_: object) -> None:
    """Let the pool reconnect if the server closed the connection: its socket is then readable.

    SQLAlchemy's `pool_pre_ping` does the same by a round trip, which costs about as much as a statement.
    """
    if not connection.closed:
        socket = poll()
        socket.register(connection.fileno(), POLLIN)
        if not socket.poll(0):
            return
    raise InvalidatePoolError


def sessions(engine: Engine) -> Sessions:
    """Create the session factory. Objects stay readable after the commit at the edge."""
    return sessionmaker(engine, expire_on_commit=False)
