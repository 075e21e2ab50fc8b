"""What the service's commands read: settings and the database, without a running service."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pydantic import ValidationError

from app.settings import Settings, get_settings
from emender.cli.errors import CommandError, ExitCode, UsageError

if TYPE_CHECKING:
    from app.db.engine import Sessions


def read_settings() -> Settings:
    """Read the settings. Raises `UsageError`, which names every invalid variable."""
    try:
        return get_settings()
    except ValidationError as error:
        lines = [f"EMENDER_{str(detail['loc'][0]).upper()}: {detail['msg']}" for detail in error.errors()]
        raise UsageError("\n".join(lines)) from error


@contextmanager
def open_database(settings: Settings) -> "Iterator[Sessions]":
    """Open the database of the settings, else that of a running `emender serve --embedded`."""
    from sqlalchemy.exc import DBAPIError

    from app.db.engine import connect, sessions
    from app.local.embedded_postgres import EmbeddedError, find_running_url

    try:
        url = settings.database_url.get_secret_value() if settings.database_url else find_running_url(settings.data_dir)
    except EmbeddedError as error:
        raise CommandError(str(error), ExitCode.UNREACHABLE) from error
    engine = connect(url)
    try:
        yield sessions(engine)
    except DBAPIError as error:
        raise CommandError(
            "The database is down, or its schema is missing: see `emender migrate`.", ExitCode.UNREACHABLE
        ) from error
    finally:
        engine.dispose()


def require_database_url(settings: Settings) -> str:
    """Return the URL of the database. Raises `UsageError` if it is not set."""
    if settings.database_url is None:
        raise UsageError(
            "EMENDER_DATABASE_URL is not set. `emender serve --embedded` has a database and workers of its own."
        )
    return settings.database_url.get_secret_value()


def require_torch() -> None:
    """Raise `CommandError` if torch is not installed."""
    if find_spec("torch") is None:
        raise CommandError("torch is not installed, and workers need it: pip install 'emender-service[worker]'.")
