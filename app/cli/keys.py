"""`emender keys …`: the first is made in the database, the others as well, or by an admin over HTTP; all are listed and
revoked over HTTP."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from app.cli.console import AsJson, asking, show, show_table
from app.cli.database import opened_database
from app.cli.errors import WrongUsage
from app.settings import get_settings

keys = typer.Typer(help="API keys.", no_args_is_help=True)


@keys.command("create")
def create_key(
    key_name: Annotated[str, typer.Argument(metavar="NAME", help="Who or what will use it.")],
    scope: Annotated[list[str], typer.Option(help="read, edit, apply or admin; give it again for more.")],
    days: Annotated[int | None, typer.Option(min=1, max=3650, help="It expires after so many; default: never.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key in the database and print its token, which is kept nowhere."""
    from app.auth.service import create_key as create
    from app.problems import Problem
    from emender.schemas.keys import ApiKeyCreated

    with opened_database(get_settings()) as sessions, sessions() as session:
        try:
            expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
            made, token = create(session, name=key_name, scopes=scope, actor="cli", expires_at=expires_at)
        except Problem as problem:
            raise WrongUsage(problem.detail) from problem
        session.commit()
    created = ApiKeyCreated(**made.model_dump(), token=token)
    show(created, as_json=as_json, otherwise=lambda: typer.echo(token))


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List API keys, newest first."""
    with asking() as client:
        found = list(client.keys.list())
    columns = ("key", "name", "prefix", "scopes", "last used", "expires", "revoked")
    rows = ((k.id, k.name, k.prefix, ", ".join(k.scopes), k.last_used_at, k.expires_at, k.revoked_at) for k in found)
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its id.")],
    as_json: AsJson = False,
) -> None:
    """Revoke an API key. It stays listed."""
    with asking() as client:
        client.keys.revoke(key)
    show({"id": key, "revoked": True}, as_json=as_json, otherwise=lambda: typer.echo(f"{key} revoked"))
