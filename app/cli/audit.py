"""`emender audit …`: asks the database itself, so that the answer does not hang on the service."""

import sys
from datetime import datetime
from typing import Annotated, Literal

import typer

from app.cli.console import AsJson
from app.cli.database import opened_database
from app.cli.errors import WrongUsage
from app.settings import get_settings

audit = typer.Typer(help="The audit log: who changed what, when and why.", no_args_is_help=True)

FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
Since = Annotated[datetime | None, typer.Option(formats=FORMATS, help="The first moment that counts.")]
Until = Annotated[datetime | None, typer.Option(formats=FORMATS, help="The first moment that does not.")]


@audit.command("verify")
def verify_log(
    head: Annotated[
        str | None, typer.Option(help="A hash that you kept of an earlier head: the log must still hold it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reckon the hash of every event again. The exit code is 1 where the chain is broken; the event is named.

    A log cut short at its end is whole in itself: only a head that was kept elsewhere shows it.
    """
    from app.audit.service import verify

    with opened_database(get_settings()) as sessions, sessions() as session:
        found = verify(session, head=head)
    if as_json:
        typer.echo(found.model_dump_json())
    elif found.valid:
        typer.echo(f"{found.events} events, whole. Head: {found.head or 'none'}")
    else:
        where = f"event {found.broken_at}" if found.broken_at else "the log"
        typer.echo(f"Broken at {where}: {found.reason}. The {found.events} events before are whole.", err=True)
    if not found.valid:
        raise typer.Exit(1)


@audit.command("export")
def export_log(
    form: Annotated[
        Literal["ndjson", "csv"], typer.Option("--format", help="One object a line, or a table.")
    ] = "ndjson",
    actor: Annotated[str | None, typer.Option(help="Who did it: key:1f2e3d4c5b6a, worker, cli.")] = None,
    action: Annotated[str | None, typer.Option(help="What was done: edit.create.")] = None,
    target: Annotated[str | None, typer.Option(help="To what: model:emoji.")] = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Write the events to standard output, oldest first. Times without an offset are UTC."""
    from app.audit.export import FORMATS as WRITERS
    from app.audit.service import AuditFilter

    if as_json and form == "csv":
        raise WrongUsage("--json is --format ndjson.")
    wanted = AuditFilter(actor=actor, action=action, target=target, since=since, until=until)
    with opened_database(get_settings()) as sessions:
        sys.stdout.writelines(WRITERS[form](sessions, wanted))
