"""`emender checkpoints pull` and `emender verify`."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from emender.cli.console import AsJson, Model, Revision, api_client, print_result, read_api_key
from emender.cli.errors import CommandError, ExitCode, UsageError

Keys = Annotated[
    list[Path] | None,
    typer.Option(help="Public key (PEM) that checkpoints are signed with, or a folder of keys (repeatable)."),
]


def pull_checkpoint(
    model: Model,
    revision: Revision = "main",
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoints. Default: one with the model's name.")
    ] = None,
    key: Keys = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Require no signature, only correct digests.")] = False,
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", help="Follow the alias; look this often.")] = None,
    keep: Annotated[int, typer.Option(help="Number of checkpoints to keep.")] = 2,
    on_change: Annotated[str, typer.Option(metavar="COMMAND", help="Run when another checkpoint is current.")] = "",
    rollback: Annotated[bool, typer.Option("--rollback", help="Return to the previous checkpoint.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the current checkpoint.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 10 if the checkpoint changed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep FOLDER/current at a checkpoint, verified. The same as `deploy/pull.py`."""
    pull = _import_pull()
    arguments = [f"--folder={folder or model}", f"--revision={revision}", f"--keep={keep}"]
    arguments += [f"--key={file}" for file in key or ()]
    arguments += [f"--watch={watch}"] if watch is not None else []
    arguments += [f"--on-change={on_change}"] if on_change else []
    flags = {"unsigned": unsigned, "rollback": rollback, "check": check, "exit-code": exit_code, "json": as_json}
    arguments += [f"--{name}" for name, is_set in flags.items() if is_set]
    if not (rollback or check):  # these need no service
        with api_client() as client:
            arguments += [f"--endpoint={client.url}", f"--model={client.models.get(model).namespace}/{model}"]
        os.environ["HF_TOKEN"] = read_api_key()  # not an argument, which other users of the machine could read
    raise typer.Exit(pull.main(arguments))


def verify(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a downloaded checkpoint.")],
    key: Keys = None,
    as_json: AsJson = False,
) -> None:
    """Verify the signature and the files of a downloaded checkpoint, without the service.

    The exit code is 1 if a file was altered, removed or added. The error names it.
    """
    pull = _import_pull()
    if not key:
        raise UsageError("Give --key with the public key that checkpoints are signed with.")
    try:
        signer = pull.verify(folder, pull.read_keys(key))
    except pull.PullError as error:
        if error.code == pull.ExitCode.USAGE:
            raise UsageError(str(error)) from None
        if not as_json:
            raise CommandError(str(error)) from None
        typer.echo(json.dumps({"verified": False, "detail": str(error)}))
        raise typer.Exit(ExitCode.FAILED) from None
    print_result(
        {"verified": True, "key": signer},
        as_json=as_json,
        as_text=lambda: typer.echo(f"{folder} is as published, signed by {signer}"),
    )


def _import_pull() -> ModuleType:
    try:
        from emender import pull
    except ImportError as error:
        raise CommandError(f"{error.name} is not installed: pip install 'emender-client[cli,verify]'") from None
    return pull
