"""`emender store …`: run by hand or from cron, where the service's database and store can be reached."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.console import AsJson, progress_bar
from app.cli.database import opened_database
from app.cli.errors import CommandError, ExitCode
from app.settings import get_settings

if TYPE_CHECKING:
    from app.db.engine import Sessions
    from app.storage.scrub import Finding
    from app.storage.store import Store

store = typer.Typer(help="The store of blobs: check it, and make room in it.", no_args_is_help=True)


@store.command("scrub")
def scrub_store(
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move what is damaged aside, so that it can be stored again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every blob again and compare it with its sha256. The exit code is 1 where something is wrong."""
    from app.storage.scrub import scrub

    with _opened() as (sessions, blobs), progress_bar() as bar:
        task = bar.add_task("checking", total=None)
        found = scrub(
            sessions,
            blobs,
            quarantine=quarantine,
            actor="cli",
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        _show("damaged, moved aside" if found.quarantined else "damaged", found.damaged)
        _show("missing", found.missing)
        typer.echo(
            f"{found.blobs} blobs, {found.bytes} bytes: {len(found.damaged)} damaged, {len(found.missing)} missing."
        )
        if not found.is_clean:
            typer.echo(
                "Restore them from a backup, or store them again: apply the same edits, upload the same image, "
                "register the same model under another name.",
                err=True,
            )
    if not found.is_clean:
        raise typer.Exit(1)


@store.command("collect")
def collect_store(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted.")] = False,
    grace: Annotated[float, typer.Option(min=1, help="Hours that a blob is kept without any reference.")] = 24.0,
    retracted: Annotated[
        bool, typer.Option("--retracted", help="Also the files of retracted versions, whose record stays.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the blobs that nothing refers to."""
    from app.storage.collect import collect_garbage

    with _opened() as (sessions, blobs):
        done = collect_garbage(
            sessions, blobs, grace=timedelta(hours=grace), retracted=retracted, dry_run=dry_run, actor="cli"
        )
    if as_json:
        typer.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    typer.echo(
        f"{'Would delete' if dry_run else 'Deleted'} {done.blobs} blobs of {done.bytes} bytes"
        + ("." if dry_run else f", and {done.temporary_files} unfinished files.")
    )


def _show(what: str, findings: "Sequence[Finding]") -> None:
    for finding in findings:
        typer.echo(f"{what}: {finding.sha256}")
        for place in finding.references:
            typer.echo(f"  {place}")


@contextmanager
def _opened() -> "Iterator[tuple[Sessions, Store]]":
    """The database and the store of the settings."""
    from app.storage import open_store
    from app.storage.store import StoreUnavailable

    settings = get_settings()
    try:
        with opened_database(settings) as sessions:
            yield sessions, open_store(settings)
    except StoreUnavailable as error:
        raise CommandError(f"{settings.store}: {error.strerror}", ExitCode.UNREACHABLE) from error
