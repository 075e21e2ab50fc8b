"""The command `emender`. What runs the service reads its settings; what asks it speaks HTTP through `app.client`.

torch is imported by the commands that compute, never at the start.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.audit_commands import audit
from app.client import Client, ClientError, Json
from app.command_error import CommandError
from app.models.captions import MAX_CAPTIONS
from app.settings import get_settings
from app.store_commands import store
from app.webhook_commands import webhooks
from editing.captions import read_captions
from editing.errors import CaptionsUnreadable

app = typer.Typer(
    help="Correct what a text-to-image model knows, and publish the corrected text encoder as a version.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
keys = typer.Typer(help="API keys, made directly in the database.", no_args_is_help=True)
models = typer.Typer(help="Base models.", no_args_is_help=True)
statistics = typer.Typer(help="What a model's memories are asked for in everyday use.", no_args_is_help=True)
edits = typer.Typer(help="Corrections.", no_args_is_help=True)
checkpoints = typer.Typer(help="Published versions.", no_args_is_help=True)
signing_key = typer.Typer(help="The key that versions are signed with.", no_args_is_help=True)
for name, group in {
    "keys": keys,
    "models": models,
    "statistics": statistics,
    "edits": edits,
    "checkpoints": checkpoints,
    "audit": audit,
    "store": store,
    "webhooks": webhooks,
    "signing-key": signing_key,
}.items():
    app.add_typer(group, name=name)

Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is done, with a progress bar.")]
Model = Annotated[str, typer.Argument(help="The model's name.")]
Keys = Annotated[
    list[Path] | None,
    typer.Option(help="The public key (PEM) that versions are signed with, or a folder of them; may be given again."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.command()
def serve(
    embedded: Annotated[bool, typer.Option("--embedded", help="Start a Postgres of our own.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="How many; 0 where they run elsewhere.")] = 1,
) -> None:
    """Run the API and its workers until Ctrl-C."""
    from app.db.embedded import EmbeddedError
    from app.observability import logging
    from app.serve import ServeError
    from app.serve import serve as run

    logging.configure()
    try:
        run(get_settings(), embedded=embedded, workers=workers, announce=lambda line: typer.echo(line))
    except (ServeError, EmbeddedError) as error:
        raise CommandError(str(error)) from error


@app.command()
def worker() -> None:
    """Run one more worker, until Ctrl-C."""
    from app.observability import logging
    from app.signing.keys import SigningKeyUnusable
    from app.worker.main import run

    _database_url()
    logging.configure()
    try:
        run(get_settings())
    except SigningKeyUnusable as error:
        raise CommandError(error.detail) from error


@app.command()
def migrate(
    service_role: Annotated[
        str | None,
        typer.Option(help="The role that the service connects as; it is let use the tables, but not rewrite history."),
    ] = None,
) -> None:
    """Bring the database's schema up to date, as the role that owns it."""
    from app.db.engine import connect
    from app.db.grants import RoleUnfit, grant
    from app.db.migrate import upgrade

    engine = connect(_database_url())
    try:
        upgrade(engine)
        if service_role is not None:
            grant(engine, role=service_role)
    except RoleUnfit as error:
        raise CommandError(str(error)) from error
    finally:
        engine.dispose()
    typer.echo("The schema is up to date.")


@app.command()
def doctor(json: AsJson = False) -> None:
    """Check settings, database, store, keys, workers and this machine, and say what to do. The exit code is 1 where
    something fails."""
    from app.doctor import examine

    findings = []
    for finding in examine(get_settings()):
        findings.append(finding)
        if not json:
            typer.echo(f"{finding.state:8} {finding.check}: {finding.detail}")
            if finding.state != "ok" and finding.next_step is not None:
                typer.echo(f"{'':8} → {finding.next_step}")
    if json:
        typer.echo(dumps([vars(finding) for finding in findings], indent=1))
    if any(finding.state == "failure" for finding in findings):
        raise typer.Exit(1)


@keys.command("create")
def create_key(
    key_name: Annotated[str, typer.Argument(metavar="NAME", help="Who or what will use it.")],
    scope: Annotated[list[str], typer.Option(help="read, edit, apply or admin; give it again for more.")],
    days: Annotated[int | None, typer.Option(min=1, max=3650, help="It expires after so many; default: never.")] = None,
) -> None:
    """Create an API key and print its token, which is kept nowhere."""
    from app.auth.service import create_key as create
    from app.db.engine import connect, sessions
    from app.problems import Problem

    engine = connect(_database_url())
    try:
        with sessions(engine)() as session:
            expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
            _, token = create(session, name=key_name, scopes=scope, actor="cli", expires_at=expires_at)
            session.commit()
    except Problem as problem:
        raise CommandError(problem.detail) from problem
    finally:
        engine.dispose()
    typer.echo(token)


@models.command("add")
def add_model(
    model: Model,
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
) -> None:
    """Register a base model."""
    if license is None and (license_name is not None or license_link is not None):
        raise CommandError("--license-name and --license-link go with --license.")
    given = _given(id=license, name=license_name, link=license_link) or None
    with _client() as client:
        made = client.register_model(
            model, source=source, revision=revision, namespace=namespace, classifier=classifier, license=given
        )
        if wait:
            made = _follow(client, f"/v1/models/{model}", what=f"registering {model}")
    typer.echo(f"{made['name']} {made['state']}")


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
) -> None:
    """Estimate a model's second moments over the captions in a file."""
    try:
        chosen = list(islice(read_captions(captions, column), samples))
    except CaptionsUnreadable as error:
        raise CommandError(error.detail) from error
    if not chosen:
        raise CommandError(f"{captions.name} holds no captions.")
    with _client() as client:
        made = client.create_statistics(model, captions=chosen)
        if wait:
            path = f"/v1/models/{model}/statistics/{made['id']}"
            made = _follow(client, path, what=f"estimating over {len(chosen)} captions")
    typer.echo(f"{made['id']} {made['state']} {made['digest'] or ''}".rstrip())


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
    steps: Annotated[int | None, typer.Option(help="Steps of the optimisation.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the record.")] = None,
    wait: Wait = False,
) -> None:
    """Ask for a correction: one of --destination, --image and --erase."""
    if [destination is not None, bool(image), erase].count(True) != 1:
        raise CommandError("Give exactly one of --destination, --image and --erase.")
    with _client() as client:
        edit: Json = {"source": source}
        if image:
            edit["destination"] = {"images": [client.upload_image(path) for path in image]}
        else:
            edit["destination"] = _given(prompt=destination, erase=erase or None, neutral=neutral)
        edit |= _given(templates=template, reason=reason)
        edit |= _given(settings=_given(objective=objective, steps=steps, seed=seed) or None)
        made = client.create_edit(model, edit)
        if wait:
            made = _follow(client, f"/v1/edits/{made['id']}", what=f"optimising {source}")
    typer.echo(f"{made['id']} {made['state']}")


@app.command()
def apply(
    model: Model,
    edit: Annotated[list[str] | None, typer.Option(help="An edit's id; without any, all that are ready.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="A version to start from.")] = None,
    add: Annotated[list[str] | None, typer.Option(help="With --from: an edit's id.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="With --from: an edit's id.")] = None,
    method: Annotated[str | None, typer.Option(help="memory (default), or cross_attention: the U-Net's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The edits' weight, between 0 and 1.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="A layer to edit; default: all up to the values'.")] = None,
    preserve: Annotated[list[str] | None, typer.Option(help="A prompt that is to keep its meaning.")] = None,
    erase_scale: Annotated[float | None, typer.Option(help="Of cross_attention: the edits' weight.")] = None,
    preserve_scale: Annotated[float | None, typer.Option(help="Of cross_attention: that of preserved prompts.")] = None,
    lamb: Annotated[float | None, typer.Option(help="Of cross_attention: λ, the weight of everything else.")] = None,
    notes: Annotated[str | None, typer.Option()] = None,
    alias: Annotated[str | None, typer.Option(help="Moved to the version once it is published.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be applied.")] = False,
    wait: Wait = False,
) -> None:
    """Write edits into the model and publish the result as the next version."""
    if start is None:
        selection: Json = {"edits": edit or "ready"} | _given(add=add, remove=remove)
    else:
        selection = {"from": start} | _given(edits=edit, add=add, remove=remove)
    request = selection | _given(method=method, alpha=alpha, layers=layer, preserve=preserve, notes=notes, alias=alias)
    request |= _given(erase_scale=erase_scale, preserve_scale=preserve_scale, lamb=lamb)
    with _client() as client:
        made = client.apply(model, request | ({"dry_run": True} if dry_run else {}))
        if dry_run:
            _show_plan(made)
            return
        if wait:
            path = f"/v1/models/{model}/checkpoints/{made['version']}"
            made = _follow(client, path, what=f"building {made['version']}")
    typer.echo(f"{made['version']} {made['state']} {made['commit'] or ''}".rstrip())
    for warning in made["warnings"]:
        typer.echo(f"warning: {warning['detail']}", err=True)
    if wait and made["alias"] is not None and not made["alias"]["moved"]:
        raise CommandError(made["alias"]["detail"])


@checkpoints.command("list")
def list_checkpoints(model: Model) -> None:
    """List a model's versions, newest first."""
    table = Table("version", "state", "edits", "alpha", "aliases", "published", "commit", "notes")
    with _client() as client:
        for item in client.checkpoints(model):
            published = (item["published_at"] or "")[:16].replace("T", " ")
            facts = [item["version"], item["state"], str(item["edit_count"]), str(item["alpha"] or "")]
            table.add_row(*facts, ", ".join(item["aliases"]), published, item["commit"] or "", item["notes"] or "")
    Console().print(table)


@checkpoints.command("pull")
def pull_checkpoint(
    model: Model,
    revision: Annotated[str, typer.Argument(help="An alias, a version or a commit.")] = "main",
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
    json: AsJson = False,
) -> None:
    """Bring a folder to a version, verified: FOLDER/current. The same as `deploy/pull.py`, whose --help has the exit
    codes."""
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
        json=json,
    )
    if not (rollback or check):  # which ask nobody
        with _client() as client:
            options.endpoint, options.token = client.url, lambda: client.api_key
            options.model = f"{client.get(f'/v1/models/{model}')['namespace']}/{model}"
    raise typer.Exit(pull.run(options))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Where a version was downloaded.")],
    key: Keys = None,
    json: AsJson = False,
) -> None:
    """Hold a downloaded version against its signature and its manifest; asks no service.

    Exit codes: 0 all is as it was published; 1 something was altered, removed or added, and is named; 2 no folder, or
    no public key.
    """
    from deploy import pull

    try:
        if not key:
            raise pull.Usage("Give --key with the public key that versions are signed with.")
        found = pull.check(folder, pull.read_keys(key))
    except (pull.Usage, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    if json:
        typer.echo(dumps({"verified": not found.problems, **vars(found)}))
    else:
        for path, problem in found.problems.items():
            typer.echo(f"{path}: {problem}", err=True)
        if not found.problems:
            typer.echo(f"{found.files} files as they were published, signed by {found.key}")
    raise typer.Exit(1 if found.problems else 0)


@signing_key.command("create")
def create_signing_key(
    file: Annotated[Path, typer.Argument(help="Where the private key is put; its owner alone can read it.")],
) -> None:
    """Make the key that versions are signed with, and print its public half."""
    from app.signing.keys import create_key as create

    try:
        made = create(file)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}. A key is never overwritten.") from error
    typer.echo(f"key {made.id}", err=True)
    typer.echo(made.public_pem, nl=False)


@signing_key.command("show")
def show_signing_key() -> None:
    """Print the public half of the key in EMENDER_SIGNING_KEY_FILE, or of the embedded stack's."""
    from app.signing.keys import SigningKeyUnusable, key_of

    settings = get_settings()
    embedded = settings.folder / "signing-key.pem"
    setting = settings.signing_key_file or (embedded if embedded.exists() else None)
    try:
        found = key_of(setting)
    except SigningKeyUnusable as error:
        raise CommandError(error.detail) from error
    if found is None:
        raise CommandError("EMENDER_SIGNING_KEY_FILE is 'none': versions are published without a signature.")
    typer.echo(f"key {found.id}", err=True)
    typer.echo(found.public_pem, nl=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the picture and the report.")] = Path("out/demo"),
    weights: Annotated[Path | None, typer.Option(help="A folder with the pipeline; default: demo/weights.")] = None,
) -> None:
    """Correct real concepts of the emoji model over HTTP, pull the result, draw before and after."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # before diffusers is imported: it warns of what we do not use
    from demo.run import DemoError, run

    try:
        run(out, weights=weights)
    except DemoError as error:
        raise CommandError(str(error)) from error


def main() -> None:
    """Run the command; what goes wrong is printed readably, and the exit code is 1."""
    try:
        app()
    except (CommandError, ClientError) as error:
        typer.echo(str(error), err=True)
        sys.exit(1)
    except ValidationError as error:
        for wrong in error.errors():
            typer.echo(f"EMENDER_{str(wrong['loc'][0]).upper()}: {wrong['msg']}", err=True)
        sys.exit(1)


@contextmanager
def _client() -> Iterator[Client]:
    with Client.from_settings(get_settings()) as client:
        yield client


def _follow(client: Client, path: str, *, what: str) -> Json:
    """Wait for the work behind a resource, showing its progress on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def seen(resource: Json) -> None:
            done, total = _progress(resource.get("progress") or {})
            bar.update(task, description=f"{what} ({resource['state']})", completed=done, total=total)

        return client.wait(path, seen=seen)


def _progress(progress: Json) -> tuple[int, int | None]:
    """How far the work is: of an edit in steps, of a checkpoint in layers, of a model in files, of statistics in
    captions."""
    for done, total in (("step", "steps"), ("done", "total"), ("files", "of"), ("captions", "of")):
        if done in progress and total in progress:
            return progress[done], progress[total]
    return 0, None


def _show_plan(plan: Json) -> None:
    for edit in plan["edits"]:
        typer.echo(f"{edit['id']}  {edit['source']} -> {edit['destination']}")
    for edit_id in plan["superseded"]:
        typer.echo(f"{edit_id}  left out: a newer edit has the same source")
    for conflict in plan["conflicts"]:
        typer.echo(f"conflict, {conflict['kind']}: {' and '.join(conflict['edits'])}")


def _database_url() -> str:
    url = get_settings().database_url
    if url is None:
        raise CommandError(
            "EMENDER_DATABASE_URL is not set. `emender serve --embedded` has a database of its own: there, "
            "more keys are made over HTTP, by POST /v1/keys with the admin key that it printed."
        )
    return url.get_secret_value()


def _given(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


if __name__ == "__main__":
    main()
