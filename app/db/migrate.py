"""Apply the migrations, once even when many processes start together."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

ROOT = Path(__file__).parents[2]
LOCK = 0x656D656E  # an advisory lock of ours: one process migrates, the others wait for it


def upgrade(engine: Engine, *, revision: str = "head") -> None:
    """Bring the database to `revision`."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.commit()
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, revision)
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
            connection.commit()
