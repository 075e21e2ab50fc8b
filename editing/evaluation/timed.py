"""TIMED: implicit assumptions to be changed (Orgad, Kawar and Belinkov: TIME, 2023), as that project ships it."""

from pathlib import Path

from editing.evaluation.contrasts import Contrast, ContrastTask, task
from editing.evaluation.rows import BenchmarkFile, Loaded

_TESTED = range(1, 6)
_COLUMNS = (
    *("old", "new"),
    *(f"{name}{number}" for number in _TESTED for name in ("positive", "gt", "negative", "gn")),
)


def load_timed(path: str | Path) -> Loaded[ContrastTask]:
    """The tasks of `TIMED_test_set.csv` (147), its selection for SD 1.4 (104) or `TIMED_validation_set.csv` (8).

    An edit makes `old` ("A banana") show `new` ("A blue banana"). Pictures of a positive should be nearer to its `gt`
    than to itself, and those of a negative to itself than to its `gn`. Spaces around texts are taken off, and a pair
    whose two texts are the same (three in the full file, one in the selection) is left out; both are noted.

    Raises `TaskUnreadable` for a file of another shape, with the row.
    """
    file = BenchmarkFile(path)
    tasks: list[ContrastTask] = []
    for row in file.table(_COLUMNS):
        old, new = row.text("old"), row.text("new")
        generality, specificity = {}, {}
        for i in _TESTED:
            positive, neighbour = f"positive{i}", f"negative{i}"
            prompt, becomes = row.text_or_blank(positive), row.text_or_blank(f"gt{i}")
            generality[positive] = Contrast(prompt, expected=becomes, other=prompt, destination_prompt=becomes)
            stays = row.text_or_blank(neighbour)
            specificity[neighbour] = Contrast(stays, stays, row.text_or_blank(f"gn{i}"), stays)
        built = task(
            row,
            source=old,
            destination=new,
            efficacy=Contrast(old, expected=new, other=old, destination_prompt=new),
            generality=generality,
            specificity=specificity,
        )
        tasks += [built] if built else []
    return file.loaded(tasks)
