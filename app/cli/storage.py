"""`emender storage`: checks and cleans the store, with access to the database and the store."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from app.cli.environment import open_database, read_settings
from emender.cli.console import AsJson, print_result
from emender.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from app.db.engine import Sessions
    from app.storage.scrub import Finding
    from app.storage.store import Store

storage = typer.Typer(help="Store of blobs.", no_args_is_help=True)


@storage.command("scrub")
def scrub_store(
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move damaged blobs aside, so that they can be stored again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every blob and verify its sha256. Exits with 1 if a blob is damaged or missing."""
    from app.storage.scrub import scrub

    with _open() as (sessions, store), _create_bar() as bar:
        task = bar.add_task("verifying", total=None)
        result = scrub(
            sessions,
            store,
            quarantine=quarantine,
            actor="cli",
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )

    def print_text() -> None:
        _print_findings("damaged, moved aside" if result.quarantined else "damaged", result.damaged)
        _print_findings("missing", result.missing)
        typer.echo(
            f"{result.blobs} blobs, {result.bytes} bytes: {len(result.damaged)} damaged, {len(result.missing)} missing."
        )
        if not result.is_clean:
            typer.echo(
                "Restore them from a backup, or store them again: apply the same edits, upload the same image, "
                "register the same model under another name.",
                err=True,
            )

    print_result(asdict(result), as_json=as_json, as_text=print_text)
    if not result.is_clean:
        raise typer.Exit(ExitCode.FAILED)


@storage.command("collect")
def collect_store(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted.")] = False,
    grace: Annotated[float, typer.Option(min=1, help="Hours to keep a blob without references.")] = 24.0,
    retracted: Annotated[
        bool, typer.Option("--retracted", help="Also delete the files of retracted checkpoints.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete blobs without references."""
    from app.storage.collect import collect_garbage

    with _open() as (sessions, store):
        result = collect_garbage(
            sessions, store, grace=timedelta(hours=grace), retracted=retracted, dry_run=dry_run, actor="cli"
        )
    line = f"{'Would delete' if dry_run else 'Deleted'} {result.blobs} blobs of {result.bytes} bytes"
    line += "." if dry_run else f", and {result.temporary_files} unfinished files."
    print_result(asdict(result) | {"dry_run": dry_run}, as_json=as_json, as_text=lambda: typer.echo(line))


def _print_findings(state: str, findings: "Sequence[Finding]") -> None:
    for finding in findings:
        typer.echo(f"{state}: {finding.sha256}")
        for reference in finding.references:
            typer.echo(f"  {reference}")


def _create_bar() -> Progress:
    """Create a progress bar on standard error. Without a terminal it shows nothing."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal)


@contextmanager
def _open() -> "Iterator[tuple[Sessions, Store]]":
    """Open the database and the store of the settings."""
    from app.storage import open_store
    from app.storage.store import StoreUnavailable

    settings = read_settings()
    try:
        with open_database(settings) as sessions:
            yield sessions, open_store(settings)
    except StoreUnavailable as error:
        raise CommandError(f"{settings.store}: {error.strerror}", ExitCode.UNREACHABLE) from error
