"""The command `emender`. What runs the service reads its settings; what asks it goes through `emender.Client`.

torch is imported by the commands that compute, never at the start.
"""

import sys
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from app.cli.audit import audit
from app.cli.checkpoints import Keys, apply, checkpoints, files
from app.cli.console import AsJson, show
from app.cli.edits import edits
from app.cli.errors import CommandError, ExitCode, WrongUsage
from app.cli.evaluations import evaluations, previews
from app.cli.keys import keys
from app.cli.models import images, models, statistics
from app.cli.storage import store
from app.cli.webhooks import webhooks
from app.settings import get_settings

if TYPE_CHECKING:
    from app.signing.keys import SigningKey

EXIT_CODES = "Exit codes: docs/reference/exit-codes.md"

app = typer.Typer(
    name="emender",
    help="Correct what a text-to-image model knows, and publish the corrected text encoder as a version.",
    epilog=f"{EXIT_CODES}.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
signing_key = typer.Typer(help="The key that versions are signed with.", no_args_is_help=True)
app.command()(apply)
for name, group in {
    "models": models,
    "statistics": statistics,
    "images": images,
    "edits": edits,
    "checkpoints": checkpoints,
    "evaluations": evaluations,
    "previews": previews,
    "files": files,
    "keys": keys,
    "audit": audit,
    "store": store,
    "webhooks": webhooks,
    "signing-key": signing_key,
}.items():
    app.add_typer(group, name=name)


@app.command()
def serve(
    embedded: Annotated[bool, typer.Option("--embedded", help="Start a Postgres of our own.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="How many; 0 where they run elsewhere.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run the API and its workers until Ctrl-C. With --json, what it says and its log are JSON, a line each."""
    if workers:
        _require_torch()
    from app.local.embedded_postgres import EmbeddedError
    from app.local.supervisor import ServeError
    from app.local.supervisor import serve as run
    from app.observability import logging

    def print_message(line: str, **facts: str) -> None:
        show(facts | {"message": line}, as_json=as_json, otherwise=lambda: typer.echo(line))

    logging.configure(as_json=as_json)
    try:
        run(get_settings(), embedded=embedded, workers=workers, on_message=print_message)
    except (ServeError, EmbeddedError) as error:
        raise CommandError(str(error)) from error


@app.command()
def worker(as_json: AsJson = False) -> None:
    """Run one more worker, until Ctrl-C. With --json its log is JSON also on a terminal."""
    _require_torch()
    from app.observability import logging
    from app.signing.keys import SigningKeyUnusable
    from app.worker.main import run

    _database_url()
    logging.configure(as_json=as_json)
    try:
        run(get_settings())
    except SigningKeyUnusable as error:
        raise WrongUsage(error.detail) from error


@app.command()
def migrate(
    service_role: Annotated[
        str | None,
        typer.Option(help="The role that the service connects as; it is let use the tables, but not rewrite history."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the database's schema up to date, as the role that owns it."""
    from sqlalchemy.exc import OperationalError

    from app.db.engine import connect
    from app.db.grants import RoleUnfit, grant_privileges
    from app.db.migrate import upgrade

    engine = connect(_database_url())
    try:
        upgrade(engine)
        if service_role is not None:
            grant_privileges(engine, role=service_role)
    except RoleUnfit as error:
        raise CommandError(str(error)) from error
    except OperationalError as error:
        raise CommandError(
            "The database does not answer: is EMENDER_DATABASE_URL right?", ExitCode.UNREACHABLE
        ) from error
    finally:
        engine.dispose()
    done = {"migrated": True, "service_role": service_role}
    show(done, as_json=as_json, otherwise=lambda: typer.echo("The schema is up to date."))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check settings, database, store, keys, workers and this machine, and say what to do. The exit code is 1 where
    something fails."""
    from app.cli.doctor import examine

    findings = []
    for finding in examine(get_settings()):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.state:8} {finding.check}: {finding.detail}")
            if finding.state != "ok" and finding.next_step is not None:
                typer.echo(f"{'':8} → {finding.next_step}")
    if as_json:
        typer.echo(dumps([vars(finding) for finding in findings], indent=1))
    if any(finding.state == "failure" for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Where a version was downloaded.")],
    key: Keys = None,
    as_json: AsJson = False,
) -> None:
    """Hold a downloaded version against its signature and its manifest; asks no service.

    The exit code is 1 where something was altered, removed or added; it is named.
    """
    from deploy import pull

    try:
        if not key:
            raise pull.Usage("Give --key with the public key that versions are signed with.")
        found = pull.check(folder, pull.read_keys(key))
    except (pull.Usage, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(ExitCode.USAGE) from None

    def write() -> None:
        for path, problem in found.problems.items():
            typer.echo(f"{path}: {problem}", err=True)
        if not found.problems:
            typer.echo(f"{found.files} files as they were published, signed by {found.key}")

    show({"verified": not found.problems, **vars(found)}, as_json=as_json, otherwise=write)
    raise typer.Exit(ExitCode.FAILED if found.problems else ExitCode.DONE)


@signing_key.command("create")
def create_signing_key(
    file: Annotated[Path, typer.Argument(help="Where the private key is put; its owner alone can read it.")],
    as_json: AsJson = False,
) -> None:
    """Make the key that versions are signed with, and print its public half."""
    from app.signing.keys import create_key as create

    try:
        made = create(file)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}. A key is never overwritten.") from error
    _show_signing_key(made, as_json=as_json)


@signing_key.command("show")
def show_signing_key(as_json: AsJson = False) -> None:
    """Print the public half of the key in EMENDER_SIGNING_KEY_FILE, or of the embedded stack's."""
    from app.signing.keys import SigningKeyUnusable, key_of

    settings = get_settings()
    embedded = settings.data_dir / "signing-key.pem"
    setting = settings.signing_key_file or (embedded if embedded.exists() else None)
    try:
        found = key_of(setting)
    except SigningKeyUnusable as error:
        raise WrongUsage(error.detail) from error
    if found is None:
        raise WrongUsage("EMENDER_SIGNING_KEY_FILE is 'none': versions are published without a signature.")
    _show_signing_key(found, as_json=as_json)


def main() -> None:
    """Run the command; what goes wrong is printed readably, and the exit code says of what kind it was."""
    try:
        app()
    except CommandError as error:
        typer.echo(str(error), err=True)
        sys.exit(error.code)
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(f"{error.filename}: {error.strerror}.", err=True)
        sys.exit(ExitCode.DISK)
    except ValidationError as error:
        for wrong in error.errors():
            typer.echo(f"EMENDER_{str(wrong['loc'][0]).upper()}: {wrong['msg']}", err=True)
        sys.exit(ExitCode.USAGE)


def _show_signing_key(key: "SigningKey", *, as_json: bool) -> None:
    def write() -> None:
        typer.echo(f"key {key.id}", err=True)
        typer.echo(key.public_pem, nl=False)

    show({"id": key.id, "public_key": key.public_pem}, as_json=as_json, otherwise=write)


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise CommandError("This installation has no torch, which workers need: pip install 'emender-service[worker]'.")


def _database_url() -> str:
    url = get_settings().database_url
    if url is None:
        raise WrongUsage(
            "EMENDER_DATABASE_URL is not set. `emender serve --embedded` has a database of its own: there, "
            "more keys are made over HTTP, by POST /v1/keys with the admin key that it printed."
        )
    return url.get_secret_value()


if __name__ == "__main__":
    main()
