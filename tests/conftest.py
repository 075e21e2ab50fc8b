"""One real Postgres for the whole run, one database a test session, one outer transaction rolled back per test."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session

from app.db.engine import connect
from app.db.grants import APPEND_ONLY
from app.db.migrate import upgrade
from app.local.embedded_postgres import EmbeddedPostgres
from tests.postgres import initialize, server_folder
from tests.servers import S3Server


@pytest.fixture(scope="session")
def database_url() -> Iterator[str]:
    """The URL of a database: EMENDER_TEST_DATABASE_URL, else of an embedded Postgres."""
    given = os.environ.get("EMENDER_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with server_folder() as folder, EmbeddedPostgres(initialize(folder)) as postgres:
        yield postgres.url


@pytest.fixture(scope="session")
def engine(database_url: str) -> Iterator[Engine]:
    engine = connect(database_url)
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One for the whole run, started by the first test that wants it; each takes a prefix of its own."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session whose commits are savepoints of a transaction that is rolled back in the end."""
    with engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, expire_on_commit=False, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


@contextmanager
def rewritable_history(connection: Connection) -> Iterator[None]:
    """Let the rows of append-only tables be changed: what only the tables' owner can do, and in the open."""
    for table in APPEND_ONLY:
        connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER append_only"))
    yield
    for table in APPEND_ONLY:
        connection.execute(text(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only"))


@contextmanager
def emptied(engine: Engine) -> Iterator[Engine]:
    """The engine of a database whose tables are empty, and are emptied afterwards."""
    from app.db.models import Base

    tables = ", ".join(table.name for table in Base.metadata.sorted_tables)

    def empty() -> None:
        with engine.begin() as connection, rewritable_history(connection):
            connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY CASCADE"))

    empty()
    yield engine
    empty()


@pytest.fixture
def clean_database(engine: Engine) -> Iterator[Engine]:
    """For tests with several connections or processes."""
    with emptied(engine):
        yield engine
