"""TIMED, a benchmark of implicit assumptions to change (Orgad, Kawar and Belinkov: TIME, 2023), from its own files."""

from pathlib import Path

from editing.evaluation.contrasts import Contrast, ContrastTask, build_task
from editing.evaluation.rows import BenchmarkFile, Loaded

_TESTED = range(1, 6)
_COLUMNS = (
    *("old", "new"),
    *(f"{name}{number}" for number in _TESTED for name in ("positive", "gt", "negative", "gn")),
)


def load_timed(path: str | Path) -> Loaded[ContrastTask]:
    """Load the tasks of `TIMED_test_set.csv` (147), its selection for SD 1.4 (104) or `TIMED_validation_set.csv` (8).

    An edit makes `old` ("A banana") show `new` ("A blue banana"). Pictures of a positive should be nearer to its `gt`
    than to itself, and those of a negative to itself than to its `gn`. Spaces around texts are removed, and a pair
    whose two texts are the same (three in the full file, one in the selection) is left out; both are noted.

    Raises `TaskUnreadable` with the row for a file of another shape.
    """
    file = BenchmarkFile(path)
    tasks: list[ContrastTask] = []
    for row in file.read_csv(_COLUMNS):
        old, new = row.read_text("old"), row.read_text("new")
        generality, specificity = {}, {}
        for i in _TESTED:
            prompt, expected = row.read_optional_text(f"positive{i}"), row.read_optional_text(f"gt{i}")
            generality[f"positive{i}"] = Contrast(prompt, expected=expected, other=prompt, destination_prompt=expected)
            neighbor = row.read_optional_text(f"negative{i}")
            specificity[f"negative{i}"] = Contrast(
                neighbor, expected=neighbor, other=row.read_optional_text(f"gn{i}"), destination_prompt=neighbor
            )
        task = build_task(
            row,
            source=old,
            destination=new,
            efficacy=Contrast(old, expected=new, other=old, destination_prompt=new),
            generality=generality,
            specificity=specificity,
        )
        tasks += [task] if task else []
    return file.finish(tasks)
