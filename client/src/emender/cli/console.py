"""What the commands share: their client, waiting, output and common arguments."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar
from urllib.parse import unquote

import typer
from pydantic import BaseModel

from emender import ApiError, Client, ConnectionFailed, EmenderError, WaitTimeout
from emender.cli.errors import CommandError, ExitCode
from emender.progress import show_progress
from emender.requests import OnStatus

Resource = TypeVar("Resource", covariant=True)

MAX_COMPLETIONS = 100
SECRETS = Path("/run/secrets")
EXIT_CODES = {
    401: ExitCode.UNAUTHORIZED,
    403: ExitCode.UNAUTHORIZED,
    404: ExitCode.NOT_FOUND,
    409: ExitCode.CONFLICT,
    410: ExitCode.NOT_FOUND,
    412: ExitCode.CONFLICT,
    428: ExitCode.CONFLICT,
    429: ExitCode.UNREACHABLE,
}


class WaitFunction(Protocol[Resource]):
    """The `wait` method of a resource, with its ids bound."""

    def __call__(self, *, on_status: OnStatus, timeout: float | None) -> Resource: ...


@contextmanager
def api_client() -> Iterator[Client]:
    """Open the client. Its errors end the command, with similar names if a name is unknown."""
    with create_client() as client:
        try:
            yield client
        except EmenderError as error:
            hint = _suggest_names(client, error) if isinstance(error, ApiError) else None
            raise CommandError("\n".join(filter(None, (str(error), hint))), find_exit_code(error)) from error


def create_client(**options: Any) -> Client:
    """Create a client of EMENDER_URL. Without it, of the service on this machine."""
    url = read_setting("url") or f"http://127.0.0.1:{os.environ.get('EMENDER_PORT', 8000)}"
    return Client(url, api_key=read_api_key(), **options)


def read_api_key() -> str:
    """Read EMENDER_API_KEY, else the admin key that `emender serve --embedded` wrote. Raises `CommandError`."""
    if api_key := read_setting("api_key"):
        return api_key
    key_file = Path(os.environ.get("EMENDER_DATA_DIR", "var")) / "admin-key"
    try:
        return key_file.read_text().strip()
    except OSError:
        raise CommandError(
            f"No API key: set EMENDER_API_KEY. (`emender serve --embedded` writes one to {key_file}.)",
            ExitCode.UNAUTHORIZED,
        ) from None


def read_setting(name: str) -> str | None:
    """Read EMENDER_<NAME>, else the file /run/secrets/emender_<name> of a container."""
    secret = SECRETS / f"emender_{name}"
    return os.environ.get(f"EMENDER_{name.upper()}") or (secret.read_text().strip() if secret.is_file() else None)


def find_exit_code(error: EmenderError) -> ExitCode:
    """Find the exit code of an error of the client."""
    match error:
        case ApiError(status=status):
            return EXIT_CODES.get(status, ExitCode.UNREACHABLE if status >= 500 else ExitCode.REJECTED)
        case ConnectionFailed():
            return ExitCode.UNREACHABLE
        case WaitTimeout():
            return ExitCode.TIMED_OUT
    return ExitCode.FAILED


def wait_for(wait: WaitFunction[Resource], label: str, *, command: str, timeout: float | None = None) -> Resource:
    """Wait for work and show its progress on standard error. After Ctrl-C, name the command that shows it again."""
    try:
        with show_progress(label) as update:
            return wait(on_status=update, timeout=timeout)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted: {label} continues. `{command}` shows it.", err=True)
        raise


def print_result(
    result: BaseModel | Iterable[BaseModel] | dict[str, Any], *, as_json: bool, as_text: Callable[[], object]
) -> None:
    """Print a result as JSON, or call `as_text` to print it as text."""
    if not as_json:
        as_text()
    elif isinstance(result, dict):
        typer.echo(dumps(result))
    elif isinstance(result, BaseModel):
        typer.echo(result.model_dump_json())
    else:
        typer.echo("[" + ", ".join(item.model_dump_json() for item in result) + "]")


def print_lines(lines: Iterable[object]) -> None:
    """Print each item on a line."""
    for line in lines:
        typer.echo(str(line))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table as wide as the terminal. In a pipe, each row is one line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 1_000
        table.expand = False
    console.print(table)


def print_fields(resource: BaseModel, *names: str) -> None:
    """Print each of these fields that has a value on a line."""
    for name in names:
        value = getattr(resource, name)
        if value not in (None, "", [], {}):
            typer.echo(f"{name.replace('_', ' ')}: {value}")


def format_time(time: Any) -> str:
    """Format a time to the minute; None is empty."""
    return f"{time:%Y-%m-%d %H:%M}" if time else ""


def complete_model(incomplete: str) -> list[str]:
    """Complete the name of a model."""
    return _complete(lambda client: (model.name for model in client.models.list()), incomplete)


def complete_revision(context: typer.Context, incomplete: str) -> list[str]:
    """Complete an alias or a version of the model on the command line."""

    def names(client: Client) -> Iterator[str]:
        model = context.params["model"]
        yield from (alias.name for alias in client.aliases.list(model))
        yield from (checkpoint.version for checkpoint in client.checkpoints.list(model))

    return _complete(names, incomplete)


def complete_alias(context: typer.Context, incomplete: str) -> list[str]:
    """Complete an alias of the model on the command line."""
    return _complete(lambda client: (alias.name for alias in client.aliases.list(context.params["model"])), incomplete)


def complete_edit(incomplete: str) -> list[tuple[str, str]]:
    """Complete the id of a recent edit, with its source as help."""
    sources = {}

    def ids(client: Client) -> Iterator[str]:
        for edit in islice(client.edits.list(), MAX_COMPLETIONS):
            sources[str(edit.id)] = f"{edit.source}, {edit.state}"
            yield str(edit.id)

    return [(name, sources[name]) for name in _complete(ids, incomplete)]


Steps = Annotated[int | None, typer.Option(help="Number of inference steps. Default: the model family's.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance. Default: the model family's.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end of the work, with a progress bar.")]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Maximum time to wait. Then exit with 13; the work continues.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Argument(help="Name of the model.", autocompletion=complete_model)]
Revision = Annotated[str, typer.Argument(help="Version (v3), alias or commit.", autocompletion=complete_revision)]
Version = Annotated[str, typer.Argument(help="Version, such as v3.", autocompletion=complete_revision)]
EditId = Annotated[str, typer.Argument(metavar="EDIT", help="Id of the edit.", autocompletion=complete_edit)]


def _complete(names: Callable[[Client], Iterable[str]], incomplete: str) -> list[str]:
    """List the names that begin with `incomplete`. Errors give no names: a shell cannot show them."""
    try:
        with create_client(timeout=2.0, retries=0) as client:
            return [name for name in islice(names(client), MAX_COMPLETIONS) if name.startswith(incomplete)]
    except Exception:
        return []


def _suggest_names(client: Client, error: ApiError) -> str | None:
    """Suggest existing names if the model, the checkpoint or the alias of the request does not exist."""
    problem, names = error.type.rpartition("/")[2], unquote(error.instance).split("/")
    try:
        if problem == "model-not-found" and len(names) > 3:
            models = [model.name for model in islice(client.models.list(), 1_000)]
            similar = get_close_matches(names[3], models) or models[:5]
            if not similar:
                return "There are no models. `emender models register NAME SOURCE` registers one."
            return f"Existing models: {', '.join(similar)}. `emender models list` lists all."
        if problem in ("checkpoint-not-found", "alias-not-found") and len(names) > 5:
            revisions = [alias.name for alias in client.aliases.list(names[3])]
            revisions += [checkpoint.version for checkpoint in islice(client.checkpoints.list(names[3]), 5)]
            if not revisions:
                return "The model has no checkpoints. `emender apply` publishes one."
            return f"Existing aliases and versions: {', '.join(revisions)}."
    except EmenderError:
        pass  # the key may lack the scope to list them
    return None
