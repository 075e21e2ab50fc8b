"""`emender apply`, `emender checkpoints …`, `emender files …`: versions, the aliases that name them, where files come
from."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.console import (
    AsJson,
    Model,
    Revision,
    Timeout,
    Version,
    Wait,
    asking,
    complete_alias,
    complete_revision,
    follow,
    given,
    progress_bar,
    show,
    show_facts,
    show_table,
)
from app.cli.errors import CommandError, ExitCode, WrongUsage

if TYPE_CHECKING:
    from emender import Client
    from emender.checkpoints import Alias
    from emender.schemas.checkpoints import ApplyPlan, CheckpointOut, DifferenceOut

checkpoints = typer.Typer(help="Published versions, and the aliases that name them.", no_args_is_help=True)
files = typer.Typer(help="Files in the wild.", no_args_is_help=True)

MOST_LAYERS = 20  # that a difference shows

AliasName = Annotated[str, typer.Argument(help="The alias: production.", autocompletion=complete_alias)]
Reason = Annotated[str | None, typer.Option(help="Why; for the audit log.")]
Keys = Annotated[
    list[Path] | None,
    typer.Option(help="The public key (PEM) that versions are signed with, or a folder of them; may be given again."),
]


def apply(
    model: Model,
    edit: Annotated[list[str] | None, typer.Option(help="An edit's id; without any, all that are ready.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="A version to start from.", autocompletion=complete_revision)
    ] = None,
    add: Annotated[list[str] | None, typer.Option(help="With --from: an edit's id.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="With --from: an edit's id.")] = None,
    method: Annotated[str | None, typer.Option(help="text_encoder (default), or cross_attention: the U-Net's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The edits' weight, between 0 and 1.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="A layer to edit; default: all up to the values'.")] = None,
    contexts: Annotated[str | None, typer.Option(help="own (default), or many: for names that are not known.")] = None,
    preserve: Annotated[list[str] | None, typer.Option(help="A prompt that is to keep its meaning.")] = None,
    erase_scale: Annotated[float | None, typer.Option(help="Of cross_attention: the edits' weight.")] = None,
    preserve_scale: Annotated[float | None, typer.Option(help="Of cross_attention: that of preserved prompts.")] = None,
    regularization_weight: Annotated[
        float | None, typer.Option(help="Of cross_attention: λ, the weight of everything else.")
    ] = None,
    notes: Annotated[str | None, typer.Option(help="What the version is for.")] = None,
    alias: Annotated[str | None, typer.Option(help="Moved to the version once it is published.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be applied.")] = False,
    wait: Wait = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Write edits into the model and publish the result as the next version."""
    if start is None:
        selection: dict[str, Any] = {"edits": edit or "ready"} | given(add=add, remove=remove)
    else:
        selection = {"from": start} | given(edits=edit, add=add, remove=remove)
    request = selection | given(method=method, alpha=alpha, layers=layer, preserve=preserve, notes=notes, alias=alias)
    request |= given(
        contexts=contexts,
        erase_scale=erase_scale,
        preserve_scale=preserve_scale,
        regularization_weight=regularization_weight,
    )
    with asking() as client:
        if dry_run:
            plan = client.checkpoints.plan(model, request)
            return show(plan, as_json=as_json, otherwise=lambda: _write_plan(plan))
        made = client.checkpoints.apply(model, request)
        if wait:
            made = _built(client, model, made.version, timeout=timeout)
    show(made, as_json=as_json, otherwise=lambda: _write_line(made))
    if wait and made.alias is not None and not made.alias.moved:
        raise CommandError(made.alias.detail, ExitCode.CONFLICT)


@checkpoints.command("list")
def list_checkpoints(model: Model, as_json: AsJson = False) -> None:
    """List a model's versions, newest first."""
    with asking() as client:
        found = list(client.checkpoints.list(model))
    columns = ("version", "state", "edits", "alpha", "aliases", "published", "commit", "notes")
    rows = (
        (
            item.version,
            item.state,
            item.edit_count,
            item.alpha,
            ", ".join(item.aliases),
            item.published_at and f"{item.published_at:%Y-%m-%d %H:%M}",
            item.commit,
            item.notes,
        )
        for item in found
    )
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@checkpoints.command("show")
def show_checkpoint(model: Model, revision: Revision, as_json: AsJson = False) -> None:
    """Show a version: its edits and what each has left undone, its warnings, its files."""
    with asking() as client:
        found = client.checkpoints.get(model, revision)

    def write() -> None:
        show_facts(found, "version", "state", "commit", "aliases", "alpha", "parent", "notes", "progress", "statistics")
        for edit in found.edits:
            left = "" if edit.relative_residual is None else f", {edit.relative_residual:.2f} left undone"
            typer.echo(f"edit {edit.id}: {edit.source}{left}")
        for warning in found.warnings:
            typer.echo(f"warning: {warning.detail}")
        for file in found.files:
            typer.echo(f"file {file.path}: {file.size} bytes, sha256 {file.sha256}")
        if found.problem is not None:
            typer.echo(f"problem: {found.problem.get('detail')}")

    show(found, as_json=as_json, otherwise=write)


@checkpoints.command("watch")
def watch_checkpoint(model: Model, revision: Revision, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Wait until a version is published."""
    with asking() as client:
        made = _built(client, model, revision, timeout=timeout)
    show(made, as_json=as_json, otherwise=lambda: _write_line(made))


@checkpoints.command("diff")
def show_difference(
    model: Model,
    revision: Revision,
    against: Annotated[
        str, typer.Argument(help="Another version, or base: the model.", autocompletion=complete_revision)
    ] = "base",
    as_json: AsJson = False,
) -> None:
    """Show what differs between a version and another: edits, tensors, files."""
    with asking() as client:
        found = client.checkpoints.difference(model, revision, against=against)
    show(found, as_json=as_json, otherwise=lambda: _write_difference(found))


@checkpoints.command("alias")
def set_alias(
    model: Model,
    alias: Annotated[
        str | None, typer.Argument(help="The alias; without one, list all.", autocompletion=complete_alias)
    ] = None,
    version: Annotated[
        str | None,
        typer.Argument(help="Where to point it; without one, say where it points.", autocompletion=complete_revision),
    ] = None,
    expect: Annotated[
        str | None, typer.Option(help="Move it only if it is at this version; `none`: only if it is new.")
    ] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """List aliases, show one, or point it at a version: by compare-and-swap, so that no move of others is lost."""
    with asking() as client:
        if alias is None:
            found = client.aliases.list(model)
            rows = ((item.name, item.version, f"{item.updated_at:%Y-%m-%d %H:%M}", item.commit) for item in found)
            columns = ("alias", "version", "moved", "commit")
            return show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))
        if version is None:
            now = client.aliases.get(model, alias)
            return show(now, as_json=as_json, otherwise=lambda: typer.echo(f"{alias} {now.version}"))
        before = _alias(client, model, alias)
        where = before.version if before else "none"
        if expect not in (None, where):
            raise CommandError(f"{alias} is at {where}, not at {expect}. Nothing was moved.", ExitCode.CONFLICT)
        _move(client, model, alias, version, before=before, reason=reason, as_json=as_json)


@checkpoints.command("rollback")
def roll_back(
    model: Model,
    alias: AliasName = "production",
    to: Annotated[
        str | None, typer.Option(help="Default: where it was before.", autocompletion=complete_revision)
    ] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at the version where it was before, and say so in the audit log."""
    with asking() as client:
        before = client.aliases.get(model, alias)
        if to is None:
            periods = islice(client.aliases.history(model, alias), 200)
            earlier = (period.version for period in periods if period.version not in (None, before.version))
            to = next(earlier, None)
            if to is None:
                what = f"{alias} was never anywhere but at {before.version}: give --to."
                raise CommandError(what, ExitCode.CONFLICT)
        _move(client, model, alias, to, before=before, reason=reason or "rollback", as_json=as_json)


@checkpoints.command("history")
def show_history(
    model: Model,
    alias: AliasName = "production",
    at: Annotated[str | None, typer.Option(help="A day (UTC), or a moment with its offset.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where an alias pointed, newest first."""
    with asking() as client:
        found = list(client.aliases.history(model, alias, at_time=at))
    rows = ((p.version or "(deleted)", p.since, p.until or "now", p.moved_by) for p in found)
    columns = ("version", "since", "until", "moved by")
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


@checkpoints.command("retract")
def retract(
    model: Model,
    version: Version,
    reason: Annotated[str, typer.Option(help="Why; for the record.")],
    as_json: AsJson = False,
) -> None:
    """Stop serving a version, also through its aliases; the record stays."""
    with asking() as client:
        found = client.checkpoints.retract(model, version, reason=reason)
    show(found, as_json=as_json, otherwise=lambda: typer.echo(f"{found.version} {found.state}"))


@checkpoints.command("pull")
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
    if not (rollback or check):  # which ask nobody
        with asking() as client:
            options.endpoint, options.token = client.url, lambda: client.api_key
            options.model = f"{client.models.get(model).namespace}/{model}"
    with progress_bar(shown=watch is None) as bar:
        task = bar.add_task(f"pulling {revision}", total=None)

        def seen(source: pull.Source) -> None:
            what = f"pulling {revision}: file {source.file} of {source.files}, {source.received >> 20} MiB"
            bar.update(task, description=what, completed=source.file - 1, total=source.files)

        options.seen = seen
        code = pull.run(options)
    raise typer.Exit(code)


@files.command("trace")
def trace_file(
    file: Annotated[str, typer.Argument(help="A file, or its sha256.")],
    as_json: AsJson = False,
) -> None:
    """Find which versions, and so which edits, a file came from."""
    from deploy.pull import SHA256, sha256_of

    path = Path(file)
    if not path.is_file() and not SHA256.fullmatch(file):
        raise WrongUsage(f"{file} is neither a file nor a sha256.")
    with asking() as client:
        found = client.files.trace(sha256_of(path) if path.is_file() else file)
    rows = (
        (o.model, o.version or "(base model)", o.state, o.path, ", ".join(e.source for e in o.edits))
        for o in found.origins
    )
    columns = ("model", "version", "state", "path", "edits")
    show(found, as_json=as_json, otherwise=lambda: show_table(columns, rows))


def _built(client: "Client", model: str, version: str, *, timeout: float | None) -> "CheckpointOut":
    again = f"emender checkpoints watch {model} {version}"
    return follow(
        lambda **how: client.checkpoints.wait(model, version, **how),
        f"building {version}",
        again=again,
        timeout=timeout,
    )


def _alias(client: "Client", model: str, alias: str) -> "Alias | None":
    from emender import Refused

    try:
        return client.aliases.get(model, alias)
    except Refused as refused:
        if refused.type.endswith("/alias-not-found"):
            return None
        raise


def _move(
    client: "Client",
    model: str,
    alias: str,
    version: str,
    *,
    before: "Alias | None",
    reason: str | None,
    as_json: bool,
) -> None:
    moved = client.aliases.move(model, alias, version, expected=before, reason=reason)
    line = f"{alias} {before.version + ' -> ' if before else ''}{moved.version}"
    show(moved, as_json=as_json, otherwise=lambda: typer.echo(line))


def _write_line(made: "CheckpointOut") -> None:
    typer.echo(f"{made.version} {made.state} {made.commit or ''}".rstrip())
    for warning in made.warnings:
        typer.echo(f"warning: {warning.detail}", err=True)


def _write_plan(plan: "ApplyPlan") -> None:
    for edit in plan.edits:
        typer.echo(f"{edit.id}  {edit.source} -> {edit.destination}")
    for edit_id in plan.superseded:
        typer.echo(f"{edit_id}  left out: a newer edit has the same source")
    for conflict in plan.conflicts:
        typer.echo(f"conflict, {conflict.kind}: {' and '.join(map(str, conflict.edits))}")


def _write_difference(found: "DifferenceOut") -> None:
    typer.echo(f"{found.version} against {found.against}")
    for sign, edits in (("+", found.added), ("-", found.removed)):
        for edit in edits:
            typer.echo(f"{sign} {edit.source}  ({edit.id})")
    layers = sorted(found.layers, key=lambda layer: -layer.relative_norm)
    for layer in layers[:MOST_LAYERS]:
        typer.echo(f"{layer.relative_norm:9.2e}  {layer.path} {layer.tensor}")
    if len(layers) > MOST_LAYERS:
        typer.echo(f"           and {len(layers) - MOST_LAYERS} tensors that differ less")
    for file in found.files:
        typer.echo(f"{file.change:<9}  {file.path}")
