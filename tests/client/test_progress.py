"""Progress as lines in a pipe, and as a bar on a terminal."""

import io
from uuid import UUID

import pytest
from rich.console import Console

from emender.progress import show_progress
from emender.schemas.common import Progress, WorkStatus


def create_status(state: str, done: int = 0) -> WorkStatus:
    progress = Progress(stage="optimizing", done=done, total=4) if done else None
    return WorkStatus(id=UUID(int=0), state=state, attempt=1, progress=progress, problem=None)


def show(*statuses: WorkStatus) -> None:
    with show_progress("edit dog") as update:
        for status in statuses:
            update(status)


@pytest.mark.parametrize("rich", [True, False])
def test_pipe_gets_a_line_for_each_state(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich:
        monkeypatch.setattr("emender.progress.find_spec", lambda _: None)
    show(*map(create_status, ("queued", "optimizing", "optimizing", "ready")))
    assert capsys.readouterr() == ("", "edit dog: queued\nedit dog: optimizing\nedit dog: ready\n")


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=terminal, force_terminal=True, width=120, no_color=True)
    )
    show(create_status("queued"), create_status("optimizing", 1))
    assert "edit dog (optimizing)" in terminal.getvalue() and "25%" in terminal.getvalue()
