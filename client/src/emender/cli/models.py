"""`emender models`, `emender statistics`, `emender images`."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from emender import Client, License
from emender.captions import read_captions
from emender.cli.console import (
    AsJson,
    Model,
    Timeout,
    Wait,
    api_client,
    print_fields,
    print_lines,
    print_result,
    print_table,
    wait_for,
)
from emender.cli.errors import UsageError
from emender.errors import CaptionsUnreadable
from emender.schemas.models import MAX_CAPTIONS, ModelOut

models = typer.Typer(help="Base models.", no_args_is_help=True)
statistics = typer.Typer(help="Second-moment statistics of a model.", no_args_is_help=True)
images = typer.Typer(help="Reference images.", no_args_is_help=True)


@models.command("register")
def register_model(
    model: Annotated[str, typer.Argument(help="Name for the model.")],
    source: Annotated[str, typer.Argument(help="Hub id, or name of a folder in EMENDER_MODEL_ROOTS.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace under which the model is pulled.")] = None,
    classifier: Annotated[
        str | None, typer.Option(help="Classifier for its pictures: an installed one, a folder, or a hub id.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License for the model cards. Default: that of the model's README.md.")
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of the license, with --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="URL of the license, with --license other.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Register a base model."""
    if license is None and (license_name is not None or license_link is not None):
        raise UsageError("--license-name and --license-link require --license.")
    terms = License.model_construct(id=license, name=license_name, link=license_link) if license else None
    with api_client() as client:
        registered = client.models.register(
            model, source=source, revision=revision, namespace=namespace, classifier=classifier, license=terms
        )
        if wait:
            registered = _wait_for_model(client, model, timeout=timeout)
    print_result(registered, as_json=as_json, as_text=lambda: typer.echo(f"{registered.name} {registered.state}"))


@models.command("watch")
def watch_model(model: Model, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Wait until a model is registered."""
    with api_client() as client:
        found = _wait_for_model(client, model, timeout=timeout)
    print_result(found, as_json=as_json, as_text=lambda: typer.echo(f"{found.name} {found.state}"))


@models.command("delete")
def delete_model(model: Model, as_json: AsJson = False) -> None:
    """Delete a model whose registration failed."""
    with api_client() as client:
        client.models.delete(model)
    print_result({"name": model, "deleted": True}, as_json=as_json, as_text=lambda: typer.echo(f"{model} deleted"))


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List models, newest first."""
    with api_client() as client:
        found = list(client.models.list())
    columns = ("model", "state", "family", "source", "statistics", "classifier")
    rows = ((m.name, m.state, m.family, m.source, m.statistics and m.statistics.state, m.classifier) for m in found)
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@models.command("show")
def show_model(model: Model, as_json: AsJson = False) -> None:
    """Show a model: its family, encoders, digest and statistics."""
    with api_client() as client:
        found = client.models.get(model)

    def print_text() -> None:
        print_fields(found, "name", "state", "family", "source", "revision", "namespace", "classifier", "digest")
        for encoder in found.encoders:
            typer.echo(f"{encoder.name}: {encoder.layers} layers, width {encoder.width}, MLP width {encoder.mlp_width}")
        if found.statistics is not None:
            typer.echo(f"statistics: {found.statistics.id} {found.statistics.state}")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.detail}")

    print_result(found, as_json=as_json, as_text=print_text)


@statistics.command("create")
def create_statistics(
    model: Model,
    captions: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="File: .txt, .csv, .tsv, .json, .jsonl, .ndjson or .parquet."),
    ],
    column: Annotated[str | None, typer.Option(help="Column of the captions. Default: caption, else text.")] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=MAX_CAPTIONS, help="Number of captions, from the first.")
    ] = MAX_CAPTIONS,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a model's second moments over the captions of a file."""
    try:
        chosen = list(islice(read_captions(captions, column), samples))
    except CaptionsUnreadable as error:
        raise UsageError(f"{error}.") from error
    if not chosen:
        raise UsageError(f"{captions.name} has no captions.")
    with api_client() as client:
        created = client.statistics.create(model, captions=chosen)
        if wait:
            created = wait_for(
                lambda **options: client.statistics.wait(model, created.id, **options),
                f"estimating over {len(chosen)} captions",
                command=f"emender statistics list {model}",
                timeout=timeout,
            )
    if created.truncated:
        note = (
            f"{created.truncated} of {created.captions} captions are longer than the model reads, and were truncated."
        )
        typer.echo(note, err=True)
    line = f"{created.id} {created.state} {created.digest or ''}".rstrip()
    print_result(created, as_json=as_json, as_text=lambda: typer.echo(line))


@statistics.command("list")
def list_statistics(model: Model, as_json: AsJson = False) -> None:
    """List the statistics of a model, newest first."""
    with api_client() as client:
        found = list(client.statistics.list(model))
    rows = ((s.id, s.state, s.captions_name, s.captions, s.truncated, s.tokens, s.digest) for s in found)
    columns = ("statistics", "state", "captions name", "captions", "truncated", "tokens", "digest")
    print_result(found, as_json=as_json, as_text=lambda: print_table(columns, rows))


@images.command("upload")
def upload_images(
    file: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="PNG, JPEG or WebP (repeatable).")],
    as_json: AsJson = False,
) -> None:
    """Upload reference images and print their ids."""
    with api_client() as client:
        found = [client.images.upload(path) for path in file]
    print_result(found, as_json=as_json, as_text=lambda: print_lines(image.id for image in found))


def _wait_for_model(client: Client, model: str, *, timeout: float | None) -> ModelOut:
    return wait_for(
        lambda **options: client.models.wait(model, **options),
        f"registering {model}",
        command=f"emender models watch {model}",
        timeout=timeout,
    )
