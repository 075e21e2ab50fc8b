"""`emender checkpoints pull`, `emender verify`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from emender.cli.console import AsJson, Model, Revision, api_client, print_result
from emender.cli.errors import ExitCode

Keys = Annotated[
    list[Path] | None,
    typer.Option(help="Public key (PEM) that checkpoints are signed with, or a folder of keys (repeatable)."),
]


def pull_checkpoint(
    model: Model,
    revision: Revision = "main",
    folder: Annotated[
        Path | None, typer.Option(help="Where versions are kept; default: one named as the model.")
    ] = None,
    key: Keys = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Ask for no signature, only for right digests.")] = False,
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", help="Follow the alias, looking so often.")] = None,
    keep: Annotated[int, typer.Option(help="Versions to keep, the current one too.")] = 2,
    on_change: Annotated[str, typer.Option(metavar="COMMAND", help="Run for each version that became current.")] = "",
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back to the version before.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the current version.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 10 where the version changed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a folder to a version, verified: FOLDER/current. The same as `deploy/pull.py`."""
    from deploy import pull

    options = pull.Options(
        folder or Path(model),
        revision=revision,
        key=key or (),
        unsigned=unsigned,
        watch=watch,
        keep=keep,
        on_change=on_change,
        rollback=rollback,
        check=check,
        exit_code=exit_code,
        json=as_json,
    )
    if not (rollback or check):  # these need no service
        with api_client() as client:
            api_key = client._connection._http.headers["Authorization"].removeprefix("Bearer ")
            options.endpoint, options.token = client.url, lambda: api_key
            options.model = f"{client.models.get(model).namespace}/{model}"
    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, redirect_stdout=False, disable=watch is not None or not console.is_terminal
    ) as bar:
        task = bar.add_task(f"pulling {revision}", total=None)

        def seen(source: pull.Source) -> None:
            what = f"pulling {revision}: file {source.file} of {source.files}, {source.received >> 20} MiB"
            bar.update(task, description=what, completed=source.file - 1, total=source.files)

        options.seen = seen
        code = pull.run(options)
    raise typer.Exit(code)


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

    print_result({"verified": not found.problems, **vars(found)}, as_json=as_json, as_text=write)
    raise typer.Exit(ExitCode.FAILED if found.problems else ExitCode.DONE)
