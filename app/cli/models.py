"""`emender models …`, `statistics …`, `images …`: what is edited, and what edits are shown by."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.console import (
    AsJson,
    Model,
    Timeout,
    Wait,
    asking,
    follow,
    given,
    show,
    show_facts,
    show_lines,
    show_table,
)
from app.cli.errors import WrongUsage
from editing.captions import read_captions
from editing.errors import CaptionsUnreadable
from emender.schemas.models import MAX_CAPTIONS

if TYPE_CHECKING:
    from emender import Client
    from emender.schemas.models import ModelOut

models = typer.Typer(help="Base models.", no_args_is_help=True)
statistics = typer.Typer(help="What a model's memories are asked for in everyday use.", no_args_is_help=True)
images = typer.Typer(help="Reference pictures.", no_args_is_help=True)


@models.command("add")
def add_model(
    model: Annotated[str, typer.Argument(help="How it is to be named.")],
    source: Annotated[str, typer.Argument(help="A hub id, or the name of a folder in EMENDER_MODEL_ROOTS.")],
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Under which it is pulled.")] = None,
    classifier: Annotated[
        str | None, typer.Option(help="What judges its pictures: an installed classifier, a folder, or a hub id.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the versions' model cards; default: as the model's README.md says.")
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="With --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="With --license other.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Register a base model."""
    if license is None and (license_name is not None or license_link is not None):
        raise WrongUsage("--license-name and --license-link go with --license.")
    terms = given(id=license, name=license_name, link=license_link) or None
    asked = given(name=model, source=source, revision=revision, namespace=namespace, classifier=classifier)
    with asking() as client:
        made = client.models.register(asked | given(license=terms))
        if wait:
            made = _registered(client, model, timeout=timeout)
    show(made, as_json=as_json, otherwise=lambda: typer.echo(f"{made.name} {made.state}"))


@models.command("watch")
def watch_model(model: Model, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Wait until a model is registered."""
    with asking() as client:
        made = _registered(client, model, timeout=timeout)
    show(made, as_json=as_json, otherwise=lambda: typer.echo(f"{made.name} {made.state}"))


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List models, newest first."""
    with asking() as client:
        found = list(client.models.list())
    columns = ("model", "state", "family", "source", "statistics", "classifier")
    rows = ((m.name, m.state, m.family, m.source, m.statistics and m.statistics.state, m.classifier) for m in found)
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@models.command("show")
def show_model(model: Model, as_json: AsJson = False) -> None:
    """Show a model: family, digest, statistics."""
    with asking() as client:
        found = client.models.get(model)

    def write() -> None:
        show_facts(found, "name", "state", "family", "source", "revision", "namespace", "classifier", "digest")
        for encoder in found.encoders:
            typer.echo(f"{encoder.name}: {encoder.layers} layers, {encoder.width} wide, memory {encoder.mlp_width}")
        if found.statistics is not None:
            typer.echo(f"statistics: {found.statistics.id} {found.statistics.state}")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.detail}")

    show(found, as_json=as_json, otherwise=write)


@statistics.command("add")
def add_statistics(
    model: Model,
    captions: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A .txt, .csv, .tsv, .json, .jsonl or .parquet file."),
    ],
    column: Annotated[str | None, typer.Option(help="Of a table; default: caption, else text.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=MAX_CAPTIONS, help="Send the first so many.")] = MAX_CAPTIONS,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a model's second moments over the captions in a file."""
    try:
        chosen = list(islice(read_captions(captions, column), samples))
    except CaptionsUnreadable as error:
        raise WrongUsage(error.detail) from error
    if not chosen:
        raise WrongUsage(f"{captions.name} holds no captions.")
    with asking() as client:
        made = client.statistics.create(model, {"captions": chosen})
        if wait:
            made = follow(
                lambda **how: client.statistics.wait(model, made.id, **how),
                f"estimating over {len(chosen)} captions",
                again=f"emender statistics list {model}",
                timeout=timeout,
            )
    line = f"{made.id} {made.state} {made.digest or ''}".rstrip()
    show(made, as_json=as_json, otherwise=lambda: typer.echo(line))


@statistics.command("list")
def list_statistics(model: Model, as_json: AsJson = False) -> None:
    """List a model's statistics, newest first."""
    with asking() as client:
        found = list(client.statistics.list(model))
    rows = ((s.id, s.state, s.captions_name, s.captions, s.tokens, s.digest) for s in found)
    columns = ("statistics", "state", "captions of", "captions", "tokens", "digest")
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@images.command("add")
def add_images(
    file: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="PNG, JPEG or WebP.")],
    as_json: AsJson = False,
) -> None:
    """Upload reference pictures and print their ids."""
    with asking() as client:
        found = [client.images.upload(path) for path in file]
    show(found, as_json=as_json, otherwise=lambda: show_lines(image.id for image in found))


def _registered(client: "Client", model: str, *, timeout: float | None) -> "ModelOut":
    again = f"emender models watch {model}"
    return follow(lambda **how: client.models.wait(model, **how), f"registering {model}", again=again, timeout=timeout)
