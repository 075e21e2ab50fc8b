"""`emender keys`: API keys. `create` writes to the database, so that the first key needs no other."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from app.cli.environment import open_database, read_settings
from emender.cli.console import AsJson, api_client, print_result, print_table
from emender.cli.errors import UsageError
from emender.schemas.keys import ApiKeyCreated

keys = typer.Typer(help="API keys.", no_args_is_help=True)


@keys.command("create")
def create_key(
    key_name: Annotated[str, typer.Argument(metavar="NAME", help="Name of its user or purpose.")],
    scope: Annotated[list[str], typer.Option(help="Scope: read, edit, apply or admin (repeatable).")],
    days: Annotated[int | None, typer.Option(min=1, max=3650, help="Days until it expires. Default: never.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key in the database and print its token, which is shown only once."""
    from app.auth.service import create_key as create
    from app.problems import Problem

    with open_database(read_settings()) as sessions, sessions() as session:
        try:
            expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
            key, token = create(session, name=key_name, scopes=scope, actor="cli", expires_at=expires_at)
        except Problem as problem:
            raise UsageError(problem.detail) from problem
        session.commit()
    created = ApiKeyCreated(**key.model_dump(), token=token)
    print_result(created, as_json=as_json, as_text=lambda: typer.echo(token))


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List API keys, newest first."""
    with api_client() as client:
        found = list(client.keys.list())
    columns = ("key", "name", "prefix", "scopes", "last used", "expires", "revoked")
    rows = ((k.id, k.name, k.prefix, ", ".join(k.scopes), k.last_used_at, k.expires_at, k.revoked_at) for k in found)
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id of the key.")], as_json: AsJson = False
) -> None:
    """Revoke an API key. It stays in the list."""
    with api_client() as client:
        client.keys.revoke(key)
    print_result({"id": key, "revoked": True}, as_json=as_json, as_text=lambda: typer.echo(f"{key} revoked"))
