"""Apply the migrations, and check whether they are applied."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session

ROOT = Path(__file__).parents[2]
LOCK = 0x656D656E  # advisory lock: one process migrates, others wait


class SchemaBehind(Exception):
    """The database lacks migrations of this version. The message names both revisions."""


def upgrade(engine: Engine, *, revision: str = "head") -> None:
    """Migrate the database to `revision`. Processes that start together migrate it once."""
    config = _config()
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.commit()
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, revision)
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
            connection.commit()


def check_schema(session: Session | Connection) -> bool:
    """Return whether the schema is of this version. False: it is newer, which older code can use.

    Raises `SchemaBehind` if migrations are missing.
    """
    known = list_revisions()
    applied = None
    if session.scalar(text("SELECT to_regclass('alembic_version')")) is not None:
        applied = session.scalar(text("SELECT version_num FROM alembic_version"))
    if applied is None:
        raise SchemaBehind("The database has no schema; run `emender migrate`.")
    if applied in known[1:]:
        raise SchemaBehind(f"The schema is at {applied}, this version needs {known[0]}; run `emender migrate`.")
    return bool(applied == known[0])


@cache
def list_revisions() -> tuple[str, ...]:
    """Return the revisions of this version, newest first."""
    return tuple(script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    return config
