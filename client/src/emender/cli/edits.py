"""`emender edits`: edits, one by one or from a file."""

from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from emender import Destination, StageOneSettings
from emender.cli.console import (
    AsJson,
    EditId,
    Guidance,
    Model,
    Steps,
    Timeout,
    Wait,
    api_client,
    complete_model,
    format_time,
    print_fields,
    print_lines,
    print_result,
    print_table,
    wait_for,
)
from emender.cli.errors import CommandError, ExitCode, UsageError
from emender.errors import ValidationFailed
from emender.requests import drop_none
from emender.schemas.edits import EditState, Objective, TextOptimizer
from emender.tables import TableError, open_text, read_table

edits = typer.Typer(help="Edits.", no_args_is_help=True)

MediaType = Literal["application/json", "application/x-ndjson", "text/csv"]
TABLE_COLUMNS = ("source", "destination")
BATCH_TYPES: dict[str, MediaType] = {
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".ndjson": "application/x-ndjson",
    ".csv": "text/csv",
    ".tsv": "text/csv",
}


@edits.command("create")
def create_edit(
    model: Model,
    source: Annotated[str, typer.Argument(help="Concept to edit.")],
    destination: Annotated[str | None, typer.Option(help="Prompt to draw instead.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Reference image to draw like (repeatable).")
    ] = None,
    balance: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT=WEIGHT", help="Prompt and weight of a mixture (repeatable).")
    ] = None,
    erase: Annotated[bool, typer.Option("--erase", help="Erase the concept.")] = False,
    neutral: Annotated[str | None, typer.Option(help="Text in its place, with --erase.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with {} where the concept goes (repeatable).")
    ] = None,
    objective: Annotated[Objective | None, typer.Option(help="Loss to minimize.")] = None,
    optimization_steps: Annotated[int | None, typer.Option(help="Number of optimization steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of Adam.")] = None,
    text_optimizer: Annotated[TextOptimizer | None, typer.Option(help="Optimizer of the text loss.")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    layer: Annotated[int | None, typer.Option(help="Layer whose output is edited.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    reason: Annotated[str | None, typer.Option(help="Reason, for the record.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Label (repeatable).")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Create an edit, with one of --destination, --image, --balance and --erase."""
    if [destination is not None, bool(image), bool(balance), erase].count(True) != 1:
        raise UsageError("Give exactly one of --destination, --image, --balance and --erase.")
    target = drop_none(prompt=destination, erase=erase or None, neutral=neutral, balance=_parse_weights(balance))
    settings = drop_none(
        objective=objective,
        optimization_steps=optimization_steps,
        learning_rate=learning_rate,
        text_optimizer=text_optimizer,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        layer=layer,
        seed=seed,
    )
    with api_client() as client:
        if image:
            target["images"] = [client.images.upload(path).id for path in image]
        # `model_construct` validates nothing, so that the service names every invalid field at once.
        created = client.edits.create(
            model,
            source=source,
            destination=Destination.model_construct(**target),
            templates=template,
            settings=StageOneSettings.model_construct(**settings) if settings else None,
            reason=reason,
            labels=_parse_labels(label),
        )
        if wait:
            created = wait_for(
                lambda **options: client.edits.wait(created.id, **options),
                f"optimizing {source}",
                command=f"emender edits watch {created.id}",
                timeout=timeout,
            )
    print_result(created, as_json=as_json, as_text=lambda: typer.echo(f"{created.id} {created.state}"))


@edits.command("batch")
def create_batch(
    model: Model,
    file: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="JSON list, .jsonl, .ndjson, or a table of source and destination: .csv, .tsv.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Create the edits of a file, 1 to 5,000, all or none."""
    suffix = file.suffix.lower()
    if suffix not in BATCH_TYPES:
        raise UsageError(f"{file.name} has an unknown suffix. Use one of {', '.join(BATCH_TYPES)}.")
    with open_text(file) as opened:
        text = opened.read()
    with api_client() as client:
        try:
            content = text.encode("utf-8", "surrogateescape")  # the service names bytes that are not UTF-8
            created = client.edits.upload_batch(model, content, media_type=BATCH_TYPES[suffix])
        except ValidationFailed as error:
            message = _describe_rejection(error, file.name, _find_places(text, BATCH_TYPES[suffix]))
            raise CommandError(message, ExitCode.REJECTED) from error
    print_result(created, as_json=as_json, as_text=lambda: print_lines(f"{e.id} {e.source}" for e in created.edits))


@edits.command("list")
def list_edits(
    model: Annotated[str | None, typer.Option(help="Name of the model.", autocompletion=complete_model)] = None,
    state: Annotated[EditState | None, typer.Option(help="State of the edits.")] = None,
    source: Annotated[str | None, typer.Option(help="Source of the edits.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of edits.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List edits, newest first."""
    with api_client() as client:
        found = list(islice(client.edits.list(model=model, state=state, source=source), limit))
    rows = (
        (e.id, e.model, e.source, _format_destination(e.destination), e.state, format_time(e.created_at)) for e in found
    )
    columns = ("edit", "model", "source", "destination", "state", "created")
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@edits.command("show")
def show_edit(edit: EditId, as_json: AsJson = False) -> None:
    """Show an edit: its state, settings and losses."""
    with api_client() as client:
        found = client.edits.get(edit)

    def print_text() -> None:
        print_fields(found, "id", "model", "source", "destination", "state", "reason", "labels", "progress")
        print_fields(found, "templates", "settings")
        if (value := found.value) is not None:
            losses = (("text loss", value.text_loss), ("noise loss", value.noise_loss))
            facts = [f"{name} {loss:.4g}" for name, loss in losses if loss is not None]
            facts += [f"{encoder.name} layer {encoder.layer}" for encoder in value.encoders]
            typer.echo(f"value: {', '.join(facts)}, sha256 {value.sha256}")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.detail}")

    print_result(found, as_json=as_json, as_text=print_text)


@edits.command("watch")
def watch_edit(edit: EditId, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Wait until an edit is ready."""
    with api_client() as client:
        found = wait_for(
            lambda **options: client.edits.wait(edit, **options),
            f"edit {edit}",
            command=f"emender edits watch {edit}",
            timeout=timeout,
        )
    print_result(found, as_json=as_json, as_text=lambda: typer.echo(f"{found.id} {found.state}"))


@edits.command("value")
def save_value(
    edit: EditId,
    file: Annotated[Path, typer.Argument(help="Path of the safetensors file to write.")],
    as_json: AsJson = False,
) -> None:
    """Save the value of an edit as safetensors."""
    with api_client() as client:
        content = client.edits.value(edit)
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    print_result({"file": str(file), "bytes": len(content)}, as_json=as_json, as_text=lambda: typer.echo(str(file)))


@edits.command("cancel")
def cancel_edit(edit: EditId, as_json: AsJson = False) -> None:
    """Cancel an edit: at once if it is queued, else at the next step."""
    with api_client() as client:
        found = client.edits.cancel(edit)
    print_result(found, as_json=as_json, as_text=lambda: typer.echo(f"{found.id} {found.state}"))


@edits.command("retry")
def retry_edit(edit: EditId, as_json: AsJson = False) -> None:
    """Queue a failed or cancelled edit again."""
    with api_client() as client:
        found = client.edits.retry(edit)
    print_result(found, as_json=as_json, as_text=lambda: typer.echo(f"{found.id} {found.state}"))


def _find_places(text: str, media_type: MediaType) -> list[str]:
    """Return where each edit of a batch is, as a text editor counts lines. Empty for JSON: items have no line."""
    if media_type == "application/x-ndjson":
        return [f"line {number}" for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if media_type == "text/csv":
        try:
            return [f"line {line}" for line, _ in read_table(StringIO(text, newline=""), columns=TABLE_COLUMNS)]
        except TableError:  # the service names the line
            return []
    return []


def _describe_rejection(error: ValidationFailed, name: str, places: list[str]) -> str:
    lines = [f"No edit was created from {name}."]
    for field in error.errors:
        _, index, *fields = [*field.pointer.split("/", 2), ""]
        if index.isdecimal():
            place = places[int(index)] if int(index) < len(places) else f"item {int(index) + 1}"
            lines.append(f"  {name}, {place}: {fields[0] or 'the edit'}: {field.detail}")
        else:
            lines.append(f"  {name}: {field.detail}")
    return "\n".join(lines if error.errors else [*lines, f"  {error.detail}"])


def _parse_labels(labels: list[str] | None) -> dict[str, str] | None:
    pairs = [label.partition("=") for label in labels or ()]
    if not all(separator for _, separator, _ in pairs):
        raise UsageError("Give --label as NAME=VALUE.")
    return {name: value for name, _, value in pairs} or None


def _parse_weights(balance: list[str] | None) -> dict[str, float] | None:
    try:
        return {prompt: float(weight) for prompt, _, weight in (item.rpartition("=") for item in balance or ())} or None
    except ValueError:
        raise UsageError("Give --balance as PROMPT=WEIGHT, with a number as the weight.") from None


def _format_destination(destination: dict[str, Any]) -> str:
    match destination:
        case {"prompt": prompt}:
            return str(prompt)
        case {"images": images}:
            return f"{len(images)} images"
        case {"erase": _}:
            return "erased"
    return "balance of " + ", ".join(destination.get("balance", {}))
