"""The database engine and its sessions: sync SQLAlchemy over psycopg 3, the same for API and worker."""

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import Session, sessionmaker

Sessions = sessionmaker[Session]


def database_url(url: str) -> URL:
    """`postgresql://…` and `postgres://…` as given by operators, with psycopg 3 as the driver."""
    return make_url(url).set(drivername="postgresql+psycopg")


def connect(url: str, *, pool_size: int = 10, idle_seconds: float | None = None) -> Engine:
    """An engine whose connections are tested before use, so that a restarted Postgres costs one reconnect.

    Its errors show the statement without the values, which belong in no log. A transaction in which nothing is asked
    for `idle_seconds` is ended by Postgres, which lets go of its locks: whoever began it may be frozen.
    """
    timeout = {}
    if idle_seconds is not None:
        timeout["options"] = f"-c idle_in_transaction_session_timeout={round(idle_seconds * 1000)}"
    return create_engine(
        database_url(url),
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=10,
        hide_parameters=True,
        connect_args=timeout,
    )


def sessions(engine: Engine) -> Sessions:
    """The session factory; objects stay readable after the commit at the edge."""
    return sessionmaker(engine, expire_on_commit=False)
