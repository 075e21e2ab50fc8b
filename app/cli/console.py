"""What the commands share: their client, how they wait, what they write, the arguments that several have.

The client is imported on first use: `--help` and completion of options need not wait for it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar
from urllib.parse import unquote

import typer

from app.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.progress import Progress

    from emender import Client, EmenderError, Refused
    from emender.schemas.common import WorkStatus

Found = TypeVar("Found", covariant=True)

MOST_COMPLETED = 100
"""How far work is: an edit in steps, a checkpoint in layers, an evaluation in pictures, a model in files, statistics in
captions."""
CODES = {
    401: ExitCode.UNAUTHORIZED,
    403: ExitCode.UNAUTHORIZED,
    404: ExitCode.NOT_FOUND,
    410: ExitCode.NOT_FOUND,
    409: ExitCode.CONFLICT,
    412: ExitCode.CONFLICT,
    428: ExitCode.CONFLICT,
    429: ExitCode.UNREACHABLE,
}


class Waiting(Protocol[Found]):
    """The `wait` of a group of the client, of something."""

    def __call__(self, *, seen: "Callable[[WorkStatus], object]", timeout: float | None) -> Found: ...


@contextmanager
def asking() -> "Iterator[Client]":
    """The client of `EMENDER_URL` and `EMENDER_API_KEY`, by default the service on this machine and its first admin
    key. What it raises ends the command, with the names that are near where one is unknown."""
    from emender import EmenderError, Refused

    with connect() as client:
        try:
            yield client
        except EmenderError as error:
            near = _near(client, error) if isinstance(error, Refused) else None
            raise CommandError("\n".join(filter(None, (str(error), near))), code_of(error)) from error


def connect(**options: Any) -> "Client":
    from app.settings import get_settings
    from emender import Client

    settings = get_settings()
    url = settings.url or f"http://{settings.host}:{settings.port}"
    if settings.api_key is not None:
        return Client(url, api_key=settings.api_key.get_secret_value(), **options)
    key_file = settings.data_dir / "admin-key"
    try:
        return Client(url, api_key=key_file.read_text().strip(), **options)
    except OSError:
        raise CommandError(
            f"No API key: set EMENDER_API_KEY. (`emender serve --embedded` leaves one in {key_file}.)",
            ExitCode.UNAUTHORIZED,
        ) from None


def code_of(error: "EmenderError") -> ExitCode:
    """The exit code that an error of the client ends a command with."""
    from emender import Refused, Unreachable, WaitedInVain

    match error:
        case Refused(status=status):
            beyond = ExitCode.UNREACHABLE if status >= 500 else ExitCode.REJECTED
            return CODES.get(status, beyond)
        case Unreachable():
            return ExitCode.UNREACHABLE
        case WaitedInVain():
            return ExitCode.TIMED_OUT
    return ExitCode.FAILED


def follow(wait: Waiting[Found], what: str, *, again: str, timeout: float | None = None) -> Found:
    """Wait for work, showing its progress on standard error: a bar on a terminal, else a line for each state.

    `again` is the command that shows it once we are interrupted.
    """
    state = ""
    try:
        with progress_bar() as bar:
            task = bar.add_task(what, total=None)

            def seen(status: "WorkStatus") -> None:
                nonlocal state
                now = status.progress
                stage, done, total = (now.stage, now.done, now.total) if now else (status.state, 0, None)
                bar.update(task, description=f"{what} ({stage})", completed=done, total=total)
                if bar.disable and status.state != state:
                    typer.echo(f"{what}: {status.state}", err=True)
                state = status.state

            return wait(seen=seen, timeout=timeout)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted: {what} goes on. `{again}` shows it.", err=True)
        raise


def progress_bar(*, shown: bool = True) -> "Progress":
    """On standard error; it shows nothing where that is no terminal. Standard output is left alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True)
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        disable=not (shown and console.is_terminal),
    )


def show(
    found: "BaseModel | Iterable[BaseModel] | dict[str, Any]", *, as_json: bool, otherwise: Callable[[], object]
) -> None:
    """Write it as JSON, or let `otherwise` write it for people."""
    if not as_json:
        otherwise()
    elif isinstance(found, dict):
        typer.echo(dumps(found))
    elif hasattr(found, "model_dump_json"):
        typer.echo(found.model_dump_json())
    else:
        typer.echo("[" + ", ".join(item.model_dump_json() for item in found) + "]")


def show_lines(lines: Iterable[object]) -> None:
    for line in lines:
        typer.echo(str(line))


def show_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """On a terminal as wide as it is; in a pipe each row on one line."""
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


def show_facts(found: "BaseModel", *names: str) -> None:
    """A line for each of these fields that says something."""
    for name in names:
        value = getattr(found, name)
        if value not in (None, "", [], {}):
            typer.echo(f"{name.replace('_', ' ')}: {value}")


def given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def complete_model(incomplete: str) -> list[str]:
    return _completed(lambda client: (model.name for model in client.models.list()), incomplete)


def complete_revision(context: typer.Context, incomplete: str) -> list[str]:
    """Of the model that is named before."""

    def names(client: "Client") -> Iterator[str]:
        model = context.params["model"]
        yield from (alias.name for alias in client.aliases.list(model))
        yield from (version.version for version in client.checkpoints.list(model))

    return _completed(names, incomplete)


def complete_alias(context: typer.Context, incomplete: str) -> list[str]:
    return _completed(lambda client: (alias.name for alias in client.aliases.list(context.params["model"])), incomplete)


def complete_edit(incomplete: str) -> list[tuple[str, str]]:
    """The newest, with what they correct."""
    sources = {}

    def ids(client: "Client") -> Iterator[str]:
        for edit in islice(client.edits.list(), MOST_COMPLETED):
            sources[str(edit.id)] = f"{edit.source}, {edit.state}"
            yield str(edit.id)

    return [(name, sources[name]) for name in _completed(ids, incomplete)]


Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is done, with a progress bar.")]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Wait no longer, and exit with 13; the work goes on.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Model = Annotated[str, typer.Argument(help="The model's name.", autocompletion=complete_model)]
Revision = Annotated[
    str, typer.Argument(help="A version (v3), an alias or a commit.", autocompletion=complete_revision)
]
Version = Annotated[str, typer.Argument(help="A version: v3.", autocompletion=complete_revision)]
EditId = Annotated[str, typer.Argument(metavar="EDIT", help="The edit's id.", autocompletion=complete_edit)]


def _completed(names: "Callable[[Client], Iterable[str]]", incomplete: str) -> list[str]:
    """Those that begin so; none where the service does not answer at once."""
    try:
        with connect(timeout=2.0, retries=0) as client:
            return [name for name in islice(names(client), MOST_COMPLETED) if name.startswith(incomplete)]
    except Exception:  # a shell that completes has no place for errors
        return []


def _near(client: "Client", refused: "Refused") -> str | None:
    """What there is instead of a model or a version that there is not."""
    from emender import EmenderError

    kind, names = refused.type.rpartition("/")[2], unquote(refused.instance).split("/")
    try:
        if kind == "model-not-found" and len(names) > 3:
            known = [model.name for model in islice(client.models.list(), 1_000)]
            near = get_close_matches(names[3], known) or known[:5]
            if not near:
                return "There is none yet: `emender models add NAME SOURCE` registers one."
            return f"There is {', '.join(near)}. `emender models list` lists all."
        if kind in ("checkpoint-not-found", "alias-not-found") and len(names) > 5:
            model = names[3]
            known = [alias.name for alias in client.aliases.list(model)]
            known += [version.version for version in islice(client.checkpoints.list(model), 5)]
            return f"There is {', '.join(known)}." if known else "Nothing was published yet: see `emender apply`."
    except EmenderError:
        pass  # the key may not list them
    return None
