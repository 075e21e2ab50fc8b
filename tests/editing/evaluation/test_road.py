"""RoAD's files, published and damaged."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from editing.errors import TaskUnreadable
from editing.evaluation.contrasts import Contrast
from editing.evaluation.road import load_road
from editing.evaluation.rows import Note

ROW = {
    "Type": "Role",
    "Prompt": "The baker",
    "Oracle": "A cat as the baker",
    "Old": "A dog",
    "New": "A cat",
    **{
        f"{name}{number}": f"{words}, view {number}"
        for number in range(1, 6)
        for name, words in {
            "Positive": "The baker",
            "Positive_oracle": "A cat as the baker",
            "Positive_old": "A dog",
            "Positive_new": "A cat",
            "Negative": "The tailor",
            "Negative_new": "A tailored cat",
        }.items()
    },
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: dict[str, str], drop: str | None = None) -> Path:
        path = tmp_path / "RoAD.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, [name for name in ROW if drop is None or not name.startswith(drop)])
            table.writeheader()
            table.writerows([{name: row[name] for name in table.fieldnames} for row in rows])
        return path

    return write


class TestLoadRoad:
    def test_row_becomes_a_task(self, write: Callable[..., Path]) -> None:
        (task,) = load_road(write(ROW)).tasks
        assert (task.place, task.kind, task.source, task.destination) == ("line 2", "Role", "The baker", "A cat")
        assert task.efficacy == Contrast(
            "The baker", expected="A cat", other="A dog", destination_prompt="A cat as the baker"
        )
        assert task.generality[2] == Contrast(
            "The baker, view 3", "A cat, view 3", "A dog, view 3", "A cat as the baker, view 3"
        )
        assert task.specificity[4] == Contrast(
            "The tailor, view 5", "The tailor, view 5", "A tailored cat, view 5", "The tailor, view 5"
        )
        assert (len(task.generality), len(task.specificity)) == (5, 5)

    def test_repairs_are_noted(self, write: Callable[..., Path]) -> None:
        odd = {"Prompt": " The baker ", "Negative2": "", "Positive_old4": "a CAT, view 4"}
        loaded = load_road(write(ROW, ROW | odd))
        assert loaded.tasks[1].source == "The baker"
        assert [contrast.prompt[-1] for contrast in loaded.tasks[1].generality] == ["1", "2", "3", "5"]
        assert [contrast.prompt[-1] for contrast in loaded.tasks[1].specificity] == ["1", "3", "4", "5"]
        assert loaded.notes == (
            Note("line 3", "'Prompt': spaces around 'The baker' removed"),
            Note("line 3", "'Positive4' left out: its two texts 'A cat, view 4' and 'a CAT, view 4' are the same"),
            Note("line 3", "'Negative2' left out: its prompt or one of its texts is blank"),
        )

    def test_edit_without_a_change_is_left_out(self, write: Callable[..., Path]) -> None:
        loaded = load_road(write(ROW | {"Old": "a cat"}, ROW))
        assert [task.place for task in loaded.tasks] == ["line 3"]
        assert loaded.notes == (Note("line 2", "'the edit' left out: its two texts 'A cat' and 'a cat' are the same"),)

    def test_task_without_neighbors_is_left_out(self, write: Callable[..., Path]) -> None:
        blank = {f"Negative{number}": "" for number in range(1, 6)}
        loaded = load_road(write(ROW | blank, ROW))
        assert [task.place for task in loaded.tasks] == ["line 3"]
        assert loaded.notes[-1].place == "line 2" and "the row left out" in loaded.notes[-1].detail

    def test_file_without_destination_prompts(self, write: Callable[..., Path]) -> None:
        loaded = load_road(write(ROW, drop="Positive_oracle"))
        assert loaded.tasks[0].generality[0].destination_prompt == "A cat, view 1"
        assert [(note.place, "Positive_oracle" in note.detail) for note in loaded.notes] == [("line 1", True)]

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"New": " "}, r"RoAD.csv, line 3: 'New' is blank"),
            ({"Type": "Style"}, r"RoAD.csv, line 3: 'Type' must be 'Role' or 'Appearance', not 'Style'"),
            ({"Negative1": "a\0b"}, r"RoAD.csv, line 3: 'Negative1' must be UTF-8 text without NUL"),
        ],
    )
    def test_invalid_cell_is_named(self, write: Callable[..., Path], change: dict[str, str], complaint: str) -> None:
        with pytest.raises(TaskUnreadable, match=complaint):
            load_road(write(ROW, ROW | change))

    def test_missing_column_is_named(self, write: Callable[..., Path]) -> None:
        with pytest.raises(TaskUnreadable, match=r"RoAD.csv, line 1: there is no column 'Negative_new1', 'Nega"):
            load_road(write(ROW, drop="Negative_new"))

    @pytest.mark.parametrize(
        ("bytes_", "complaint"),
        [
            (b"Role,a", r"line 2: there is no 'Prompt'|there is no"),
            (b"\n" + b"x," * 40, r"line 3: the row has more fields than there are columns"),
            (b'"Role', r"line 2: is no CSV: unexpected end of data"),
            (b"Role,caf\xe9" + b",x" * 33, r"line 2: 'Prompt' must be UTF-8 text"),
            (b"", r"RoAD.csv: has no tasks"),
        ],
        ids=["short", "long", "quote", "latin-1", "empty"],
    )
    def test_invalid_line_is_named(self, write: Callable[..., Path], bytes_: bytes, complaint: str) -> None:
        path = write()
        path.write_bytes(path.read_bytes() + bytes_)
        with pytest.raises(TaskUnreadable, match=complaint):
            load_road(path)

    def test_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TaskUnreadable, match=r"nothing.csv: cannot be read: No such file"):
            load_road(tmp_path / "nothing.csv")

    def test_published_files(self, shared: Callable[[str], Path]) -> None:
        loaded = load_road(shared("road/RoAD_test.csv"))
        assert len(loaded.tasks) == 90
        assert sum(len(task.generality) for task in loaded.tasks) == 448
        assert sum(len(task.specificity) for task in loaded.tasks) == 450
        assert [note.place for note in loaded.notes if "left out" in note.detail] == ["line 44", "line 70"]
        assert loaded.tasks[5].source == "The Matrix male lead"
        assert len(load_road(shared("road/RoAD_validation.csv")).tasks) == 10
