from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text
from sqlalchemy.engine import make_url

from app.db.engine import connect
from app.db.migrate import ROOT, upgrade
from app.db.models import Base


@pytest.fixture
def empty(engine: Engine, database_url: str) -> Iterator[Engine]:
    """A database with nothing in it."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE IF EXISTS emender_empty"))
        connection.execute(text("CREATE DATABASE emender_empty"))
    fresh = connect(make_url(database_url).set(database="emender_empty").render_as_string(hide_password=False))
    yield fresh
    fresh.dispose()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE emender_empty"))


def test_the_migrations_make_what_the_models_say(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_many_at_once_migrate_once(empty: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: upgrade(empty), range(4)))
    assert {"jobs", "outbox", "audit_events"} <= set(inspect(empty).get_table_names())


def test_down_and_up_again(empty: Engine) -> None:
    upgrade(empty)
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    with empty.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        connection.commit()
    assert set(inspect(empty).get_table_names()) <= {"alembic_version"}
    upgrade(empty)
    assert "jobs" in inspect(empty).get_table_names()
