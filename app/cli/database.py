"""The database for commands that work beside the service, as the service itself may not answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.cli.errors import CommandError, ExitCode
from app.settings import Settings

if TYPE_CHECKING:
    from app.db.engine import Sessions


@contextmanager
def opened_database(settings: Settings) -> "Iterator[Sessions]":
    """That of the settings, else that of an `emender serve --embedded` that runs."""
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
            "The database does not answer, or lacks the schema: see `emender migrate`.", ExitCode.UNREACHABLE
        ) from error
    finally:
        engine.dispose()
