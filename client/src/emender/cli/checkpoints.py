"""`emender apply`, `emender checkpoints`, `emender files`."""

import re
from pathlib import Path
from typing import Annotated, cast

import typer

from emender import Client
from emender.cli.console import (
    AsJson,
    Model,
    Revision,
    Timeout,
    Version,
    Wait,
    api_client,
    complete_revision,
    format_time,
    print_fields,
    print_result,
    print_table,
    wait_for,
)
from emender.cli.errors import CommandError, ExitCode, UsageError
from emender.files import read_sha256
from emender.parameters import ApplyFields
from emender.requests import drop_none
from emender.schemas.checkpoints import ApplyPlan, CheckpointOut, Contexts, DifferenceOut, Method, ResidualSchedule
from emender.schemas.presets import Preset

checkpoints = typer.Typer(help="Checkpoints.", no_args_is_help=True)
files = typer.Typer(help="Files of checkpoints.", no_args_is_help=True)

MAX_TENSORS = 20
"""Tensors that a difference shows."""


def apply(
    model: Model,
    edit: Annotated[
        list[str] | None, typer.Option(help="Id of an edit (repeatable). Default: all ready edits.")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Checkpoint to start from.", autocompletion=complete_revision)
    ] = None,
    add: Annotated[list[str] | None, typer.Option(help="Id of an edit to add, with --from (repeatable).")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Id of an edit to remove, with --from (repeatable).")] = None,
    method: Annotated[Method | None, typer.Option(help="Where edits are written. Default: text_encoder.")] = None,
    preset: Annotated[Preset | None, typer.Option(help="Named settings.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the edits, between 0 and 1. Default: 0.5.")] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer to edit (repeatable). Default: every layer up to the one the edits were optimized for."
        ),
    ] = None,
    residual_schedule: Annotated[
        ResidualSchedule | None, typer.Option(help="How the layers share the residual. Default: spread.")
    ] = None,
    moment_weight: Annotated[float | None, typer.Option(help="Weight λ of the second moments. Default: 1000.")] = None,
    contexts: Annotated[
        Contexts | None, typer.Option(help="Prompts in which edits must hold; many for unknown names. Default: own.")
    ] = None,
    preserve: Annotated[list[str] | None, typer.Option(help="Prompt that must keep its meaning (repeatable).")] = None,
    erase_scale: Annotated[float | None, typer.Option(help="UCE: weight of edits. Default: 1.")] = None,
    preserve_scale: Annotated[
        float | None, typer.Option(help="UCE: weight of preserved prompts. Default: 0.1.")
    ] = None,
    regularization_weight: Annotated[
        float | None, typer.Option(help="UCE: weight λ of all else. Default: 0.5.")
    ] = None,
    notes: Annotated[str | None, typer.Option(help="Notes on the checkpoint.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to move to the checkpoint when it is published.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be applied.")] = False,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Apply edits to a model and publish the result as its next checkpoint."""
    fields = drop_none(
        edits=edit or (None if from_ else "ready"),
        from_=from_,
        add=add,
        remove=remove,
        method=method,
        preset=preset,
        alpha=alpha,
        layers=layer,
        residual_schedule=residual_schedule,
        moment_weight=moment_weight,
        contexts=contexts,
        preserve=preserve,
        erase_scale=erase_scale,
        preserve_scale=preserve_scale,
        regularization_weight=regularization_weight,
        notes=notes,
        alias=alias,
    )
    with api_client() as client:
        if dry_run:
            plan = client.checkpoints.plan(model, **cast(ApplyFields, fields))
            return print_result(plan, as_json=as_json, as_text=lambda: _print_plan(plan))
        created = client.checkpoints.apply(model, **cast(ApplyFields, fields))
        if wait:
            created = _wait_for_checkpoint(client, model, created.version, timeout=timeout)
    print_result(created, as_json=as_json, as_text=lambda: _print_checkpoint(created))
    if wait and created.alias is not None and not created.alias.moved:
        raise CommandError(created.alias.detail, ExitCode.CONFLICT)


@checkpoints.command("list")
def list_checkpoints(model: Model, as_json: AsJson = False) -> None:
    """List the checkpoints of a model, newest first."""
    with api_client() as client:
        found = list(client.checkpoints.list(model))
    columns = ("version", "state", "edits", "alpha", "aliases", "published", "commit", "notes")
    rows = (
        (
            c.version,
            c.state,
            c.edit_count,
            c.alpha,
            ", ".join(c.aliases),
            format_time(c.published_at),
            c.commit,
            c.notes,
        )
        for c in found
    )
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@checkpoints.command("show")
def show_checkpoint(model: Model, revision: Revision, as_json: AsJson = False) -> None:
    """Show a checkpoint: its edits with their relative residuals, warnings and files."""
    with api_client() as client:
        found = client.checkpoints.get(model, revision)

    def print_text() -> None:
        print_fields(found, "version", "state", "commit", "aliases", "alpha", "parent", "notes", "progress")
        print_fields(found, "statistics")
        for edit in found.edits:
            residual = "" if edit.relative_residual is None else f", relative residual {edit.relative_residual:.2f}"
            typer.echo(f"edit {edit.id}: {edit.source}{residual}")
        for warning in found.warnings:
            typer.echo(f"warning: {warning.detail}")
        for file in found.files:
            typer.echo(f"file {file.path}: {file.size} bytes, sha256 {file.sha256}")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.get('detail')}")

    print_result(found, as_json=as_json, as_text=print_text)


@checkpoints.command("watch")
def watch_checkpoint(model: Model, revision: Revision, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Wait until a checkpoint is published."""
    with api_client() as client:
        found = _wait_for_checkpoint(client, model, revision, timeout=timeout)
    print_result(found, as_json=as_json, as_text=lambda: _print_checkpoint(found))


@checkpoints.command("diff")
def compare_checkpoints(
    model: Model,
    revision: Revision,
    against: Annotated[
        str, typer.Argument(help="Checkpoint to compare with, or base.", autocompletion=complete_revision)
    ] = "base",
    as_json: AsJson = False,
) -> None:
    """Show the difference between two checkpoints: edits, tensors and files."""
    with api_client() as client:
        found = client.checkpoints.difference(model, revision, against=against)
    print_result(found, as_json=as_json, as_text=lambda: _print_difference(found))


@checkpoints.command("retract")
def retract_checkpoint(
    model: Model,
    version: Version,
    reason: Annotated[str, typer.Option(help="Reason, for the record.")],
    as_json: AsJson = False,
) -> None:
    """Stop serving a checkpoint, also through its aliases. Its record stays."""
    with api_client() as client:
        found = client.checkpoints.retract(model, version, reason=reason)
    print_result(found, as_json=as_json, as_text=lambda: typer.echo(f"{found.version} {found.state}"))


@files.command("trace")
def trace_file(
    file: Annotated[str, typer.Argument(help="Path of a file, or its sha256.")],
    as_json: AsJson = False,
) -> None:
    """Find the checkpoints and edits that a file came from."""
    path = Path(file)
    if not path.is_file() and not re.fullmatch(r"[0-9a-f]{64}", file):
        raise UsageError(f"{file} is neither a file nor a sha256.")
    with api_client() as client:
        found = client.files.trace(read_sha256(path) if path.is_file() else file)
    rows = (
        (o.model, o.version or "(base model)", o.state, o.path, ", ".join(e.source for e in o.edits))
        for o in found.origins
    )
    columns = ("model", "version", "state", "path", "edits")
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


def _wait_for_checkpoint(client: Client, model: str, version: str, *, timeout: float | None) -> CheckpointOut:
    return wait_for(
        lambda **options: client.checkpoints.wait(model, version, **options),
        f"building {version}",
        command=f"emender checkpoints watch {model} {version}",
        timeout=timeout,
    )


def _print_checkpoint(checkpoint: CheckpointOut) -> None:
    typer.echo(f"{checkpoint.version} {checkpoint.state} {checkpoint.commit or ''}".rstrip())
    for warning in checkpoint.warnings:
        typer.echo(f"warning: {warning.detail}", err=True)


def _print_plan(plan: ApplyPlan) -> None:
    for edit in plan.edits:
        typer.echo(f"{edit.id}  {edit.source} -> {edit.destination}")
    for edit_id in plan.superseded:
        typer.echo(f"{edit_id}  left out: a newer edit has the same source")
    for conflict in plan.conflicts:
        typer.echo(f"conflict, {conflict.kind}: {' and '.join(map(str, conflict.edits))}")


def _print_difference(difference: DifferenceOut) -> None:
    typer.echo(f"{difference.version} against {difference.against}")
    for sign, edits in (("+", difference.added), ("-", difference.removed)):
        for edit in edits:
            typer.echo(f"{sign} {edit.source}  ({edit.id})")
    tensors = sorted(difference.layers, key=lambda layer: -layer.relative_norm)
    for tensor in tensors[:MAX_TENSORS]:
        typer.echo(f"{tensor.relative_norm:9.2e}  {tensor.path} {tensor.tensor}")
    if len(tensors) > MAX_TENSORS:
        typer.echo(f"           and {len(tensors) - MAX_TENSORS} tensors with smaller differences")
    for file in difference.files:
        typer.echo(f"{file.change:<9}  {file.path}")
