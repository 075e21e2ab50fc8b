"""`emender audit`: reads the database directly, so that it works while the service is stopped."""

import sys
from datetime import datetime
from typing import Annotated, Literal

import typer

from app.cli.environment import open_database, read_settings
from emender.cli.console import AsJson, print_result
from emender.cli.errors import ExitCode, UsageError

audit = typer.Typer(help="Audit log: who changed what, when and why.", no_args_is_help=True)

TIME_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
Since = Annotated[datetime | None, typer.Option(formats=TIME_FORMATS, help="Earliest time. UTC without an offset.")]
Until = Annotated[datetime | None, typer.Option(formats=TIME_FORMATS, help="First later time. UTC without an offset.")]


@audit.command("verify")
def verify_log(
    head: Annotated[
        str | None, typer.Option(help="Hash of an earlier last event. The log must still contain it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify the chain of hashes. Exits with 1 if it is broken, and names the event.

    Only --head, kept outside the database, shows that the end of the log was cut off.
    """
    from app.audit.service import verify

    with open_database(read_settings()) as sessions, sessions() as session:
        found = verify(session, head=head)

    def print_text() -> None:
        if found.valid:
            typer.echo(f"{found.events} events verified. Head: {found.head or 'none'}")
        else:
            place = f"event {found.broken_at}" if found.broken_at else "the log"
            typer.echo(f"Broken at {place}: {found.reason}. {found.events} events before it are valid.", err=True)

    print_result(found, as_json=as_json, as_text=print_text)
    if not found.valid:
        raise typer.Exit(ExitCode.FAILED)


@audit.command("export")
def export_log(
    format: Annotated[Literal["ndjson", "csv"], typer.Option(help="Format of the output.")] = "ndjson",
    actor: Annotated[str | None, typer.Option(help="Actor, such as key:1f2e3d4c5b6a, worker or cli.")] = None,
    action: Annotated[str | None, typer.Option(help="Action, such as edit.create.")] = None,
    target: Annotated[str | None, typer.Option(help="Target, such as model:emoji.")] = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Write the events to standard output, oldest first."""
    from app.audit.export import EXPORTS
    from app.audit.service import AuditFilter

    if as_json and format == "csv":
        raise UsageError("--json is --format ndjson.")
    event_filter = AuditFilter(actor=actor, action=action, target=target, since=since, until=until)
    with open_database(read_settings()) as sessions:
        _, write = EXPORTS[format]
        sys.stdout.writelines(write(sessions, event_filter))
