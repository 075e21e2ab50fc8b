"""`emender aliases`: names of checkpoints, moved by compare-and-swap."""

from itertools import islice
from typing import Annotated

import typer

from emender import Client, NotFound
from emender.cli.console import (
    AsJson,
    Model,
    api_client,
    complete_alias,
    complete_revision,
    format_time,
    print_result,
    print_table,
)
from emender.cli.errors import CommandError, ExitCode
from emender.parameters import Alias

aliases = typer.Typer(help="Aliases of checkpoints, such as production.", no_args_is_help=True)

AliasName = Annotated[str, typer.Argument(help="Name of the alias.", autocompletion=complete_alias)]
Reason = Annotated[str | None, typer.Option(help="Reason, for the audit log.")]


@aliases.command("list")
def list_aliases(model: Model, as_json: AsJson = False) -> None:
    """List the aliases of a model."""
    with api_client() as client:
        found = client.aliases.list(model)
    rows = ((alias.name, alias.version, format_time(alias.updated_at), alias.commit) for alias in found)
    columns = ("alias", "version", "moved", "commit")
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@aliases.command("show")
def show_alias(model: Model, alias: AliasName = "production", as_json: AsJson = False) -> None:
    """Show the version that an alias points at."""
    with api_client() as client:
        found = client.aliases.get(model, alias)
    print_result(found, as_json=as_json, as_text=lambda: typer.echo(f"{alias} {found.version}"))


@aliases.command("move")
def move_alias(
    model: Model,
    alias: AliasName,
    version: Annotated[str, typer.Argument(help="Version to point at.", autocompletion=complete_revision)],
    expected: Annotated[
        str | None, typer.Option(help="Move only from this version; none: only create the alias.")
    ] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version, and create it if necessary. No move by someone else is overwritten."""
    with api_client() as client:
        current = _find_alias(client, model, alias)
        current_version = current.version if current else "none"
        if expected not in (None, current_version):
            raise CommandError(
                f"{alias} points at {current_version}, not at {expected}. It was not moved.", ExitCode.CONFLICT
            )
        _move(client, model, alias, version, current=current, reason=reason, as_json=as_json)


@aliases.command("rollback")
def roll_back(
    model: Model,
    alias: AliasName = "production",
    to: Annotated[
        str | None,
        typer.Option(help="Version to point at. Default: the previous one.", autocompletion=complete_revision),
    ] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at the version where it was before."""
    with api_client() as client:
        current = client.aliases.get(model, alias)
        if to is None:
            periods = islice(client.aliases.history(model, alias), 200)
            earlier = (period.version for period in periods if period.version not in (None, current.version))
            to = next(earlier, None)
            if to is None:
                raise CommandError(
                    f"{alias} never pointed at another version than {current.version}. Give --to.", ExitCode.CONFLICT
                )
        _move(client, model, alias, to, current=current, reason=reason or "rollback", as_json=as_json)


@aliases.command("history")
def show_history(
    model: Model,
    alias: AliasName = "production",
    at: Annotated[str | None, typer.Option(help="Day (UTC), or time with its offset.")] = None,
    as_json: AsJson = False,
) -> None:
    """List where an alias pointed, newest first."""
    with api_client() as client:
        found = list(client.aliases.history(model, alias, at=at))
    rows = ((p.version or "(deleted)", p.since, p.until or "now", p.moved_by) for p in found)
    columns = ("version", "since", "until", "moved by")
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@aliases.command("delete")
def delete_alias(model: Model, alias: AliasName, as_json: AsJson = False) -> None:
    """Delete an alias. Its checkpoint stays."""
    with api_client() as client:
        client.aliases.delete(model, alias, expected=client.aliases.get(model, alias))
    print_result({"name": alias, "deleted": True}, as_json=as_json, as_text=lambda: typer.echo(f"{alias} deleted"))


def _find_alias(client: Client, model: str, alias: str) -> Alias | None:
    try:
        return client.aliases.get(model, alias)
    except NotFound as error:
        if error.type.endswith("/alias-not-found"):
            return None
        raise


def _move(
    client: Client,
    model: str,
    alias: str,
    version: str,
    *,
    current: Alias | None,
    reason: str | None,
    as_json: bool,
) -> None:
    moved = client.aliases.move(model, alias, version, expected=current, reason=reason)
    line = f"{alias} {current.version + ' -> ' if current else ''}{moved.version}"
    print_result(moved, as_json=as_json, as_text=lambda: typer.echo(line))
