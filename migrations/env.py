"""Alembic's entry: takes a connection from `app.db.migrate`, or the database of the settings."""

from alembic import context

from app.db.engine import connect
from app.db.models import Base
from app.settings import get_settings


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    url = get_settings().database_url
    if url is None:
        raise SystemExit("EMENDER_DATABASE_URL is not set")
    with connect(url.get_secret_value()).connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()


run()
