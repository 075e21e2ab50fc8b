"""Apply the migrations, once even when many processes start together; and tell whether they were applied."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session

ROOT = Path(__file__).parents[2]
LOCK = 0x656D656E  # an advisory lock of ours: one process migrates, the others wait for it


def upgrade(engine: Engine, *, revision: str = "head") -> None:
    """Bring the database to `revision`."""
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


class SchemaBehind(Exception):
    """The database lacks migrations of this version; the message says which it has and which it should have."""


def check(session: Session | Connection) -> bool:
    """Whether the schema is the one that this version expects. False: it is newer, which older code gets on with.

    Raises `SchemaBehind` where migrations are to be applied.
    """
    known = _revisions()
    applied = None
    if session.scalar(text("SELECT to_regclass('alembic_version')")) is not None:
        applied = session.scalar(text("SELECT version_num FROM alembic_version"))
    if applied is None:
        raise SchemaBehind("The database has no schema; run `emender migrate`.")
    if applied in known[1:]:
        raise SchemaBehind(f"The schema is at {applied}, this version needs {known[0]}; run `emender migrate`.")
    return bool(applied == known[0])


@cache
def _revisions() -> tuple[str, ...]:
    """Those of this version, newest first."""
    return tuple(script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    return config
