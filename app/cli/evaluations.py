"""`emender evaluations …` and `emender previews …`: what is drawn and measured of versions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from app.cli.console import (
    AsJson,
    Model,
    Timeout,
    Version,
    Wait,
    asking,
    follow,
    given,
    show,
    show_facts,
    show_lines,
    show_table,
)

if TYPE_CHECKING:
    from emender import Client
    from emender.schemas.evaluations import EvaluationOut

evaluations = typer.Typer(help="What is measured of versions, by the model's classifier.", no_args_is_help=True)
previews = typer.Typer(help="Pictures of versions, beside the base model's.", no_args_is_help=True)

Evaluation = Annotated[str, typer.Argument(metavar="EVALUATION", help="Its id.")]
Folder = Annotated[Path | None, typer.Option(help="With --wait: put its pictures and reports here.")]
Steps = Annotated[int | None, typer.Option(help="Of the solver, for each picture.")]
Guidance = Annotated[float | None, typer.Option(help="How closely pictures follow their prompts.")]
Kind = Literal["preview", "check", "evaluation"]


@previews.command("create")
def create_preview(
    model: Model,
    version: Version,
    prompt: Annotated[list[str] | None, typer.Option(help="Draw this; default: the edits' own templates.")] = None,
    control: Annotated[list[str] | None, typer.Option(help="A prompt that should be drawn as before.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="A picture of each prompt; default: 0, 1 and 2.")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    wait: Wait = False,
    timeout: Timeout = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Draw prompts by the base model and by a version, at the same seeds, beside each other."""
    request = given(
        prompts=prompt,
        controls=control,
        seeds=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    with asking() as client:
        made = client.evaluations.create_preview(model, version, request)
        made = _waited(client, made, wait=wait or folder is not None, timeout=timeout, folder=folder)
    _show(made, as_json=as_json)


@evaluations.command("create")
def create_evaluation(
    model: Model,
    version: Version,
    prompt: Annotated[list[str] | None, typer.Option(help="Judge by this: a prompt with {}.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="A concept that no edit should change.")] = None,
    scale: Annotated[list[int] | None, typer.Option(help="Also measure the first so many edits alone.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture of each concept.")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    wait: Wait = False,
    timeout: Timeout = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Measure which edits of a version succeeded, and what they cost other concepts."""
    request = given(
        prompts=prompt,
        held_out=held_out,
        scales=scale,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    with asking() as client:
        made = client.evaluations.create(model, version, request)
        made = _waited(client, made, wait=wait or folder is not None, timeout=timeout, folder=folder)
    _show(made, as_json=as_json)


@evaluations.command("list")
def list_evaluations(
    model: Model,
    version: Version,
    kind: Annotated[Kind | None, typer.Option(help="Only these.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what was drawn and measured of a version, newest first: previews too."""
    with asking() as client:
        found = list(client.evaluations.list(model, version, kind=kind))
    columns = ("evaluation", "kind", "state", "asked for", "files")
    rows = (
        (e.id, e.kind, e.state, f"{e.created_at:%Y-%m-%d %H:%M}", ", ".join(file.name for file in e.files))
        for e in found
    )
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@evaluations.command("show")
def show_evaluation(model: Model, version: Version, evaluation: Evaluation, as_json: AsJson = False) -> None:
    """Show one: its state, report and files."""
    with asking() as client:
        found = client.evaluations.get(model, version, evaluation)

    def write() -> None:
        show_facts(found, "id", "kind", "model", "version", "state", "progress")
        for name, value in (found.report or {}).items():
            typer.echo(f"{name}: {value}")
        for file in found.files:
            typer.echo(f"file {file.name}: {file.size} bytes")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.get('detail')}")

    show(found, as_json=as_json, otherwise=write)


@evaluations.command("watch")
def watch_evaluation(
    model: Model, version: Version, evaluation: Evaluation, timeout: Timeout = None, as_json: AsJson = False
) -> None:
    """Wait until one is ready: a preview too."""
    with asking() as client:
        found = client.evaluations.get(model, version, evaluation)
        found = _waited(client, found, wait=True, timeout=timeout, folder=None)
    _show(found, as_json=as_json)


@evaluations.command("download")
def download_evaluation(
    model: Model,
    version: Version,
    evaluation: Evaluation,
    folder: Annotated[Path, typer.Argument(help="Where its pictures and reports are put.")],
    as_json: AsJson = False,
) -> None:
    """Download the pictures and reports of one: of a preview too."""
    with asking() as client:
        found = client.evaluations.get(model, version, evaluation)
        paths = _download(client, found, folder)
    written = {"files": [str(path) for path in paths]}
    show(written, as_json=as_json, otherwise=lambda: show_lines(paths))


@evaluations.command("cancel")
def cancel_evaluation(model: Model, version: Version, evaluation: Evaluation, as_json: AsJson = False) -> None:
    """Cancel one: at once while it is queued, else at its next picture."""
    with asking() as client:
        found = client.evaluations.cancel(model, version, evaluation)
    _show(found, as_json=as_json)


def _waited(
    client: "Client", made: "EvaluationOut", *, wait: bool, timeout: float | None, folder: Path | None
) -> "EvaluationOut":
    """It, once it is ready if we are to wait, with its files in the folder."""
    if wait:
        verb = "drawing" if made.kind == "preview" else "measuring"
        made = follow(
            lambda **how: client.evaluations.wait(made.model, made.version, made.id, **how),
            f"{verb} {made.version}",
            again=f"emender evaluations watch {made.model} {made.version} {made.id}",
            timeout=timeout,
        )
    if folder is not None:
        for path in _download(client, made, folder):
            typer.echo(str(path), err=True)
    return made


def _download(client: "Client", found: "EvaluationOut", folder: Path) -> list[Path]:
    names: Any = (file.name for file in found.files)
    return [
        client.evaluations.download(found.model, found.version, found.id, name, folder / Path(name).name)
        for name in names
    ]


def _show(found: "EvaluationOut", *, as_json: bool) -> None:
    show(found, as_json=as_json, otherwise=lambda: typer.echo(f"{found.id} {found.state}"))
