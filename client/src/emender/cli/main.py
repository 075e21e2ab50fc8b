"""The command `emender`. Distributions that are installed beside the client add their own commands to it.

They name a `typer.Typer` as an entry point of the group `emender.commands`: the service adds `serve`, `worker`, ….
"""

import sys
from importlib.metadata import entry_points

import typer

from emender.cli.aliases import aliases
from emender.cli.checkpoints import apply, checkpoints, files
from emender.cli.edits import edits
from emender.cli.errors import CommandError, ExitCode
from emender.cli.evaluations import evaluations, previews
from emender.cli.models import images, models, statistics
from emender.cli.pull import pull_checkpoint, verify
from emender.cli.webhooks import webhooks

EXIT_CODES = "Exit codes: docs/reference/exit-codes.md"

app = typer.Typer(
    name="emender",
    help="Edit what a text-to-image model knows, and publish the result as a checkpoint.",
    epilog=f"{EXIT_CODES}.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(apply)
app.command()(verify)
checkpoints.command("pull")(pull_checkpoint)
for name, group in {
    "models": models,
    "statistics": statistics,
    "images": images,
    "edits": edits,
    "checkpoints": checkpoints,
    "aliases": aliases,
    "evaluations": evaluations,
    "previews": previews,
    "files": files,
    "webhooks": webhooks,
}.items():
    app.add_typer(group, name=name)


def load_commands() -> typer.Typer:
    """Build the command with the commands of all installed distributions."""
    for entry_point in entry_points(group="emender.commands"):
        app.add_typer(entry_point.load())
    return app


def run(command: typer.Typer) -> None:
    """Run a command. Errors are printed without a traceback; the exit code says of which kind they are."""
    try:
        command()
    except CommandError as error:
        typer.echo(str(error), err=True)
        sys.exit(error.code)
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(f"{error.filename}: {error.strerror}.", err=True)
        sys.exit(ExitCode.DISK)


def main() -> None:
    """Run `emender`."""
    run(load_commands())
