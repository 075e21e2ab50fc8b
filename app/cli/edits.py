"""`emender edits …`: corrections, one by one or as a file of them."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app.cli.console import (
    AsJson,
    EditId,
    Model,
    Timeout,
    Wait,
    asking,
    complete_model,
    follow,
    given,
    show,
    show_facts,
    show_lines,
    show_table,
)
from app.cli.errors import WrongUsage
from editing.files import write_atomically

edits = typer.Typer(help="Corrections.", no_args_is_help=True)

BATCHES = {
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".ndjson": "application/x-ndjson",
    ".csv": "text/csv",
}

State = Literal["queued", "optimizing", "ready", "failed", "cancelling", "cancelled"]


@edits.command("create")
def create_edit(
    model: Model,
    source: Annotated[str, typer.Argument(help="The concept to correct.")],
    destination: Annotated[str | None, typer.Option(help="Draw it as this prompt is drawn.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Draw it as in this picture.")
    ] = None,
    erase: Annotated[bool, typer.Option("--erase", help="Draw nothing in its place.")] = False,
    neutral: Annotated[str | None, typer.Option(help="With --erase: what stands in its place.")] = None,
    template: Annotated[list[str] | None, typer.Option(help="A prompt with {} where the concept goes.")] = None,
    objective: Annotated[str | None, typer.Option(help="text, noise or hybrid.")] = None,
    optimization_steps: Annotated[int | None, typer.Option(help="Steps of the optimisation.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the record.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Ask for a correction: one of --destination, --image and --erase."""
    if [destination is not None, bool(image), erase].count(True) != 1:
        raise WrongUsage("Give exactly one of --destination, --image and --erase.")
    with asking() as client:
        edit: dict[str, Any] = {"source": source}
        if image:
            edit["destination"] = {"images": [client.images.upload(path).id for path in image]}
        else:
            edit["destination"] = given(prompt=destination, erase=erase or None, neutral=neutral)
        edit |= given(templates=template, reason=reason)
        edit |= given(settings=given(objective=objective, optimization_steps=optimization_steps, seed=seed) or None)
        made = client.edits.create(model, edit)
        if wait:
            made = follow(
                lambda **how: client.edits.wait(made.id, **how),
                f"optimising {source}",
                again=f"emender edits watch {made.id}",
                timeout=timeout,
            )
    show(made, as_json=as_json, otherwise=lambda: typer.echo(f"{made.id} {made.state}"))


@edits.command("batch")
def create_edits(
    model: Model,
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A .json list, .jsonl, or .csv: source,destination.")
    ],
    as_json: AsJson = False,
) -> None:
    """Ask for the corrections in a file, 1 to 5,000, all or none."""
    if file.suffix not in BATCHES:
        raise WrongUsage(f"{file.name}: a batch is a file that ends in {', '.join(BATCHES)}.")
    with asking() as client:
        made = client.edits.upload_batch(model, file.read_bytes(), media_type=BATCHES[file.suffix])
    show(made, as_json=as_json, otherwise=lambda: show_lines(f"{e.id} {e.source}" for e in made.edits))


@edits.command("list")
def list_edits(
    model: Annotated[str | None, typer.Option(help="Of this model.", autocompletion=complete_model)] = None,
    state: Annotated[State | None, typer.Option(help="In this state.")] = None,
    source: Annotated[str | None, typer.Option(help="Of exactly this source.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List corrections, newest first."""
    with asking() as client:
        found = list(islice(client.edits.list(model=model, state=state, source=source), limit))
    rows = (
        (e.id, e.model, e.source, _destination(e.destination), e.state, f"{e.created_at:%Y-%m-%d %H:%M}") for e in found
    )
    columns = ("edit", "model", "source", "destination", "state", "asked for")
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@edits.command("show")
def show_edit(edit: EditId, as_json: AsJson = False) -> None:
    """Show a correction: its state, settings, losses."""
    with asking() as client:
        found = client.edits.get(edit)

    def write() -> None:
        show_facts(found, "id", "model", "source", "destination", "state", "reason", "labels", "progress", "templates")
        for value in found.values:
            losses = ", ".join(
                f"{name} {loss:.4g}"
                for name, loss in (("text", value.text_loss), ("noise", value.noise_loss))
                if loss is not None
            )
            typer.echo(f"{value.encoder}: layer {value.layer}, losses {losses or 'none'}, sha256 {value.sha256}")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.detail}")

    show(found, as_json=as_json, otherwise=write)


@edits.command("watch")
def watch_edit(edit: EditId, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Wait until a correction is ready."""
    with asking() as client:
        again = f"emender edits watch {edit}"
        done = follow(lambda **how: client.edits.wait(edit, **how), f"edit {edit}", again=again, timeout=timeout)
    show(done, as_json=as_json, otherwise=lambda: typer.echo(f"{done.id} {done.state}"))


@edits.command("value")
def save_value(
    edit: EditId,
    file: Annotated[Path, typer.Argument(help="Where its vectors are put, as safetensors.")],
    as_json: AsJson = False,
) -> None:
    """Save the value vectors of a correction."""
    with asking() as client:
        content = client.edits.value(edit)
    write_atomically(file, content)
    show({"file": str(file), "bytes": len(content)}, as_json=as_json, otherwise=lambda: typer.echo(str(file)))


@edits.command("cancel")
def cancel_edit(edit: EditId, as_json: AsJson = False) -> None:
    """Cancel a correction: at once while it is queued, else at its next step."""
    with asking() as client:
        found = client.edits.cancel(edit)
    show(found, as_json=as_json, otherwise=lambda: typer.echo(f"{found.id} {found.state}"))


@edits.command("retry")
def retry_edit(edit: EditId, as_json: AsJson = False) -> None:
    """Queue a failed or cancelled correction again."""
    with asking() as client:
        found = client.edits.retry(edit)
    show(found, as_json=as_json, otherwise=lambda: typer.echo(f"{found.id} {found.state}"))


def _destination(destination: dict[str, Any]) -> str:
    match destination:
        case {"prompt": prompt}:
            return str(prompt)
        case {"images": images}:
            return f"{len(images)} pictures"
        case {"erase": _}:
            return "erased"
    return "balance of " + ", ".join(destination.get("balance", {}))
