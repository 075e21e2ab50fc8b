"""`emender audit …`: asks the database itself, so that the answer does not hang on the service."""

import sys
from datetime import datetime
from typing import Annotated, Literal

import typer

from app.opened_database import opened_database
from app.settings import get_settings

audit = typer.Typer(help="The audit log: who changed what, when and why.", no_args_is_help=True)

Text = Annotated[str | None, typer.Option()]
Moment = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"])]


@audit.command("verify")
def verify_log(
    head: Annotated[
        str | None, typer.Option(help="A hash that you kept of an earlier head: the log must still hold it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
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
    form: Annotated[Literal["ndjson", "csv"], typer.Option("--format")] = "ndjson",
    actor: Text = None,
    action: Text = None,
    target: Text = None,
    since: Moment = None,
    until: Moment = None,
) -> None:
    """Write the events to standard output, oldest first. Times without an offset are UTC."""
    from app.audit.export import FORMATS
    from app.audit.service import AuditFilter

    wanted = AuditFilter(actor=actor, action=action, target=target, since=since, until=until)
    with opened_database(get_settings()) as sessions:
        sys.stdout.writelines(FORMATS[form](sessions, wanted))
