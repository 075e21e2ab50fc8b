"""TIMED's files, real and broken."""

from collections.abc import Callable
from pathlib import Path

import pytest

from editing.errors import TaskUnreadable
from editing.evaluation.contrasts import Contrast
from editing.evaluation.timed import load_timed

COLUMNS = ["old", "new", *(f"{name}{n}" for name in ("positive", "gt", "negative", "gn") for n in range(1, 6))]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: str) -> Path:
        cells = {column: f"the {column}" for column in COLUMNS} | changes
        path = tmp_path / "TIMED.csv"
        path.write_text(f"{','.join(COLUMNS)}\r\n{','.join(cells[column] for column in COLUMNS)}\r\n")
        return path

    return write


class TestLoadTimed:
    def test_row_becomes_a_task(self, write: Callable[..., Path]) -> None:
        loaded = load_timed(write())
        (task,) = loaded.tasks
        assert (task.place, task.source, task.destination, loaded.notes) == ("line 2", "the old", "the new", ())
        assert task.efficacy == Contrast("the old", expected="the new", other="the old", destination_prompt="the new")
        assert task.generality[1] == Contrast("the positive2", "the gt2", "the positive2", "the gt2")
        assert task.specificity[1] == Contrast("the negative2", "the negative2", "the gn2", "the negative2")

    def test_pairs_of_equal_texts_are_left_out(self, write: Callable[..., Path]) -> None:
        loaded = load_timed(write(gt5="The Positive5", negative1="a pizza", gn1="a pizza "))
        assert [contrast.prompt for contrast in loaded.tasks[0].generality][-1] == "the positive4"
        assert [contrast.prompt for contrast in loaded.tasks[0].specificity][0] == "the negative2"
        assert [note.detail.split(":")[0] for note in loaded.notes] == [
            "'gn1'", "'positive5' left out", "'negative1' left out",
        ]  # fmt: skip

    def test_blank_destination_is_refused(self, write: Callable[..., Path]) -> None:
        with pytest.raises(TaskUnreadable, match=r"TIMED.csv, line 2: 'new' is blank"):
            load_timed(write(new=""))

    @pytest.mark.parametrize(
        ("name", "tasks", "left_out"),
        [
            ("TIMED_test_set.csv", 147, ["line 8", "line 8", "line 137"]),
            ("TIMED_test_set_filtered_SD14.csv", 104, ["line 97"]),
            ("TIMED_validation_set.csv", 8, []),
        ],
    )
    def test_published_files(self, shared: Callable[[str], Path], name: str, tasks: int, left_out: list[str]) -> None:
        loaded = load_timed(shared(f"timed/{name}"))
        assert len(loaded.tasks) == tasks
        assert [note.place for note in loaded.notes if "left out" in note.detail] == left_out
        assert all(task.generality and task.specificity for task in loaded.tasks)
