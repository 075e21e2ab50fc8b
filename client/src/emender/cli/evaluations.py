"""`emender previews`, `emender evaluations`."""

from pathlib import Path
from typing import Annotated

import typer

from emender import Client
from emender.cli.console import (
    AsJson,
    Guidance,
    Model,
    Steps,
    Timeout,
    Version,
    Wait,
    api_client,
    format_time,
    print_fields,
    print_lines,
    print_result,
    print_table,
    wait_for,
)
from emender.schemas.evaluations import EvaluationKind, EvaluationOut

evaluations = typer.Typer(help="Evaluations of checkpoints by the model's classifier.", no_args_is_help=True)
previews = typer.Typer(help="Pictures of checkpoints beside those of the base model.", no_args_is_help=True)

EvaluationId = Annotated[str, typer.Argument(metavar="EVALUATION", help="Id of the evaluation.")]
Folder = Annotated[Path | None, typer.Option(help="Folder for its pictures and reports. Implies --wait.")]


@previews.command("create")
def create_preview(
    model: Model,
    version: Version,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to draw (repeatable). Default: a template of each edit.")
    ] = None,
    control: Annotated[list[str] | None, typer.Option(help="Prompt that must not change (repeatable).")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of a picture of each prompt (repeatable). Default: 0, 1 and 2.")
    ] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    wait: Wait = False,
    timeout: Timeout = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Draw prompts with the base model and with a checkpoint, at the same seeds."""
    with api_client() as client:
        created = client.evaluations.create_preview(
            model,
            version,
            prompts=prompt,
            controls=control,
            seeds=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        _finish(client, created, wait=wait, timeout=timeout, folder=folder, as_json=as_json)


@evaluations.command("create")
def create_evaluation(
    model: Model,
    version: Version,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt with {} where each concept goes (repeatable).")
    ] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Concept that must not change (repeatable).")] = None,
    held_out_prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt with {} for held-out concepts (repeatable).")
    ] = None,
    scale: Annotated[
        list[int] | None, typer.Option(help="Number of edits to measure separately, from the first (repeatable).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture of each concept.")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    wait: Wait = False,
    timeout: Timeout = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well the edits of a checkpoint succeeded, and how much other concepts changed."""
    with api_client() as client:
        created = client.evaluations.create(
            model,
            version,
            prompts=prompt,
            held_out=held_out,
            held_out_prompts=held_out_prompt,
            scales=scale,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        _finish(client, created, wait=wait, timeout=timeout, folder=folder, as_json=as_json)


@evaluations.command("list")
def list_evaluations(
    model: Model,
    version: Version,
    kind: Annotated[EvaluationKind | None, typer.Option(help="Kind to list.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the evaluations, checks and previews of a checkpoint, newest first."""
    with api_client() as client:
        found = list(client.evaluations.list(model, version, kind=kind))
    columns = ("evaluation", "kind", "state", "created", "files")
    rows = ((e.id, e.kind, e.state, format_time(e.created_at), ", ".join(f.path for f in e.files)) for e in found)
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@evaluations.command("show")
def show_evaluation(model: Model, version: Version, evaluation: EvaluationId, as_json: AsJson = False) -> None:
    """Show an evaluation or a preview: its state, report and files."""
    with api_client() as client:
        found = client.evaluations.get(model, version, evaluation)

    def print_text() -> None:
        print_fields(found, "id", "kind", "model", "version", "state", "progress")
        for name, value in (found.report or {}).items():
            typer.echo(f"{name}: {value}")
        for file in found.files:
            typer.echo(f"file {file.path}: {file.size} bytes")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.get('detail')}")

    print_result(found, as_json=as_json, as_text=print_text)


@evaluations.command("watch")
def watch_evaluation(
    model: Model, version: Version, evaluation: EvaluationId, timeout: Timeout = None, as_json: AsJson = False
) -> None:
    """Wait until an evaluation or a preview is ready."""
    with api_client() as client:
        found = client.evaluations.get(model, version, evaluation)
        found = _wait_for_evaluation(client, found, timeout=timeout, folder=None)
    _print_evaluation(found, as_json=as_json)


@evaluations.command("download")
def download_evaluation(
    model: Model,
    version: Version,
    evaluation: EvaluationId,
    folder: Annotated[Path, typer.Argument(help="Folder for its pictures and reports.")],
    as_json: AsJson = False,
) -> None:
    """Download the pictures and reports of an evaluation or a preview."""
    with api_client() as client:
        paths = _download_files(client, client.evaluations.get(model, version, evaluation), folder)
    result = {"files": [str(path) for path in paths]}
    print_result(result, as_json=as_json, as_text=lambda: print_lines(paths))


@evaluations.command("cancel")
def cancel_evaluation(model: Model, version: Version, evaluation: EvaluationId, as_json: AsJson = False) -> None:
    """Cancel an evaluation or a preview: at once if it is queued, else at the next picture."""
    with api_client() as client:
        found = client.evaluations.cancel(model, version, evaluation)
    _print_evaluation(found, as_json=as_json)


def _finish(
    client: Client,
    created: EvaluationOut,
    *,
    wait: bool,
    timeout: float | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Wait for an evaluation or a preview if requested, and print it."""
    if wait or folder is not None:
        created = _wait_for_evaluation(client, created, timeout=timeout, folder=folder)
    _print_evaluation(created, as_json=as_json)


def _wait_for_evaluation(
    client: Client, created: EvaluationOut, *, timeout: float | None, folder: Path | None
) -> EvaluationOut:
    ready = wait_for(
        lambda **options: client.evaluations.wait(created.model, created.version, created.id, **options),
        f"{'drawing' if created.kind == 'preview' else 'measuring'} {created.version}",
        command=f"emender evaluations watch {created.model} {created.version} {created.id}",
        timeout=timeout,
    )
    if folder is not None:
        for path in _download_files(client, ready, folder):
            typer.echo(str(path), err=True)
    return ready


def _download_files(client: Client, evaluation: EvaluationOut, folder: Path) -> list[Path]:
    return [
        client.evaluations.download(
            evaluation.model, evaluation.version, evaluation.id, file.path, folder / Path(file.path).name
        )
        for file in evaluation.files
    ]


def _print_evaluation(evaluation: EvaluationOut, *, as_json: bool) -> None:
    print_result(evaluation, as_json=as_json, as_text=lambda: typer.echo(f"{evaluation.id} {evaluation.state}"))
