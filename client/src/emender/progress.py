"""Progress of work on a terminal or in a notebook: a bar if rich is installed, else lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from emender.schemas.common import WorkStatus

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def show_progress(label: str) -> Iterator[Callable[[WorkStatus], None]]:
    """Yield a function that shows a status, for `on_status`.

    It writes to standard error. Without rich or a terminal it writes one line at each change of the state.
    """
    bar = _create_bar() if find_spec("rich") else None
    if bar is None:
        yield _print_states(label)
        return
    with bar:
        task = bar.add_task(label, total=None)

        def update(status: WorkStatus) -> None:
            progress = status.progress
            stage, done, total = (
                (progress.stage, progress.done, progress.total) if progress else (status.state, 0, None)
            )
            bar.update(task, description=f"{label} ({stage})", completed=done, total=total)

        yield update


def _create_bar() -> "Progress | None":
    """Create a progress bar of rich. None: there is no terminal and no notebook that could show it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
        return None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, redirect_stdout=False)


def _print_states(label: str) -> Callable[[WorkStatus], None]:
    state = ""

    def update(status: WorkStatus) -> None:
        nonlocal state
        if status.state != state:
            state = status.state
            sys.stderr.write(f"{label}: {state}\n")
            sys.stderr.flush()

    return update
