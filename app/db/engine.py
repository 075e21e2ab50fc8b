"""The database engine and its sessions: sync SQLAlchemy over psycopg 3, the same for API and worker."""

from select import POLLIN, poll
from typing import Any

from psycopg import Connection
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import Session, sessionmaker

Sessions = sessionmaker[Session]


def database_url(url: str) -> URL:
    """`postgresql://…` and `postgres://…` as given by operators, with psycopg 3 as the driver."""
    return make_url(url).set(drivername="postgresql+psycopg")


def connect(url: str, *, pool_size: int = 10, idle_seconds: float | None = None) -> Engine:
    """An engine whose connections are looked at before use, so that a restarted Postgres costs one reconnect.

    Its errors show the statement without the values, which belong in no log. A transaction in which nothing is asked
    for `idle_seconds` is ended by Postgres, which lets go of its locks: whoever began it may be frozen.
    """
    made = database_url(url)
    # Planned for the values at hand: one plan for whatever value reads a million edits to list the few of a rare one.
    options = f"{made.query.get('options', '')} -c plan_cache_mode=force_custom_plan"
    if idle_seconds is not None:
        options += f" -c idle_in_transaction_session_timeout={round(idle_seconds * 1000)}"
    engine = create_engine(
        made, pool_size=pool_size, max_overflow=10, hide_parameters=True, connect_args={"options": options}
    )
    event.listen(engine, "checkout", _refuse_ended)
    return engine


def _refuse_ended(connection: Connection[Any], *_: object) -> None:
    """Let the pool connect anew where the server has ended the connection: its socket then has something to read.

    A round trip for it, as of SQLAlchemy's own `pool_pre_ping`, would cost each request about as much as a statement.
    """
    if not connection.closed:
        socket = poll()
        socket.register(connection.fileno(), POLLIN)
        if not socket.poll(0):
            return
    raise InvalidatePoolError


def sessions(engine: Engine) -> Sessions:
    """The session factory; objects stay readable after the commit at the edge."""
    return sessionmaker(engine, expire_on_commit=False)
