"""Commands that need the service: they are added to the client's command `emender`.

torch, SQLAlchemy and FastAPI are imported by the commands that need them, not at the start.
"""

from functools import cache
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.audit import audit
from app.cli.environment import read_settings, require_database_url, require_torch
from app.cli.keys import keys
from app.cli.storage import storage
from emender.cli import main as client
from emender.cli.console import AsJson, print_result
from emender.cli.errors import CommandError, ExitCode, UsageError

if TYPE_CHECKING:
    from app.signing.keys import SigningKey

commands = typer.Typer()
signing_key = typer.Typer(help="Key that checkpoints are signed with.", no_args_is_help=True)
for name, group in {"keys": keys, "audit": audit, "storage": storage, "signing-key": signing_key}.items():
    commands.add_typer(group, name=name)


@commands.command()
def serve(
    embedded: Annotated[bool, typer.Option("--embedded", help="Start an embedded Postgres.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Number of workers.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print messages and the log as JSON lines.")] = False,
) -> None:
    """Run the API and its workers until Ctrl-C."""
    if workers:
        require_torch()
    from app.local.embedded_postgres import EmbeddedError
    from app.local.supervisor import ServeError
    from app.local.supervisor import serve as run
    from app.observability import logging

    def print_message(line: str, **facts: str) -> None:
        print_result(facts | {"message": line}, as_json=as_json, as_text=lambda: typer.echo(line))

    logging.configure(as_json=as_json)
    try:
        run(read_settings(), embedded=embedded, workers=workers, on_message=print_message)
    except (ServeError, EmbeddedError) as error:
        raise CommandError(str(error)) from error


@commands.command()
def worker(as_json: Annotated[bool, typer.Option("--json", help="Print the log as JSON lines.")] = False) -> None:
    """Run a worker until Ctrl-C."""
    require_torch()
    from app.observability import logging
    from app.signing.keys import SigningKeyUnusable
    from app.worker.main import run

    settings = read_settings()
    require_database_url(settings)
    logging.configure(as_json=as_json)
    try:
        run(settings)
    except SigningKeyUnusable as error:
        raise UsageError(error.detail) from error


@commands.command()
def migrate(
    service_role: Annotated[
        str | None, typer.Option(help="Role of the service. It may use the tables, but not rewrite history.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Migrate the database's schema, as the role that owns it."""
    from sqlalchemy.exc import OperationalError

    from app.db.engine import connect
    from app.db.grants import RoleUnfit, grant_privileges
    from app.db.migrate import upgrade

    engine = connect(require_database_url(read_settings()))
    try:
        upgrade(engine)
        if service_role is not None:
            grant_privileges(engine, role=service_role)
    except RoleUnfit as error:
        raise CommandError(str(error)) from error
    except OperationalError as error:
        raise CommandError("The database is down. Check EMENDER_DATABASE_URL.", ExitCode.UNREACHABLE) from error
    finally:
        engine.dispose()
    result = {"migrated": True, "service_role": service_role}
    print_result(result, as_json=as_json, as_text=lambda: typer.echo("The schema is up to date."))


@commands.command()
def doctor(as_json: AsJson = False) -> None:
    """Check settings, database, store, keys, workers and this machine. Exits with 1 if a check fails."""
    from app.cli.doctor import examine

    findings = []
    for finding in examine(read_settings()):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.state:8} {finding.check}: {finding.detail}")
            if finding.state != "ok" and finding.next_step is not None:
                typer.echo(f"{'':8} → {finding.next_step}")
    if as_json:
        typer.echo(dumps([vars(finding) for finding in findings], indent=1))
    if any(finding.state == "failure" for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


@signing_key.command("create")
def create_signing_key(
    file: Annotated[Path, typer.Argument(help="Path of the private key to write. Only its owner can read it.")],
    as_json: AsJson = False,
) -> None:
    """Create a signing key and print its public key."""
    from app.signing.keys import create_key

    try:
        key = create_key(file)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}. Existing keys are never overwritten.") from error
    _print_signing_key(key, as_json=as_json)


@signing_key.command("show")
def show_signing_key(as_json: AsJson = False) -> None:
    """Print the public key of EMENDER_SIGNING_KEY_FILE, or of the embedded service."""
    from app.signing.keys import SigningKeyUnusable, read_configured_key

    settings = read_settings()
    embedded = settings.data_dir / "signing-key.pem"
    try:
        key = read_configured_key(settings.signing_key_file or (embedded if embedded.exists() else None))
    except SigningKeyUnusable as error:
        raise UsageError(error.detail) from error
    if key is None:
        raise UsageError("EMENDER_SIGNING_KEY_FILE is 'none': checkpoints are published without a signature.")
    _print_signing_key(key, as_json=as_json)


def _print_signing_key(key: "SigningKey", *, as_json: bool) -> None:
    def print_text() -> None:
        typer.echo(f"key {key.id}", err=True)
        typer.echo(key.public_pem, nl=False)

    print_result({"id": key.id, "public_key": key.public_pem}, as_json=as_json, as_text=print_text)


@cache
def build_command() -> typer.Typer:
    """Build `emender` with these commands, also if the entry point is not installed."""
    client.app.add_typer(commands)
    return client.app


if __name__ == "__main__":
    client.run(build_command())
