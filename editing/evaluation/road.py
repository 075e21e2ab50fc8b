"""RoAD, a benchmark of roles and appearances to update (Arad, Orgad and Belinkov: ReFACT, 2024), from its own files."""

from pathlib import Path

from editing.evaluation.contrasts import Contrast, ContrastTask, build_task
from editing.evaluation.rows import BenchmarkFile, Loaded

KINDS = ("Role", "Appearance")
_TESTED = range(1, 6)
_COLUMNS = (
    *("Type", "Prompt", "Oracle", "Old", "New"),
    *(f"{name}{number}" for number in _TESTED for name in ("Positive", "Positive_old", "Positive_new")),
    *(f"{name}{number}" for number in _TESTED for name in ("Negative", "Negative_new")),
)


def load_road(path: str | Path) -> Loaded[ContrastTask]:
    """Load the tasks of `RoAD_test.csv` (90) or `RoAD_validation.csv` (10).

    An edit makes `Prompt` ("Canada's Prime Minister"), which shows `Old`, show `New`. The five positives are other
    names of the same thing, the five negatives its neighbors. The validation file has no `Positive_oracle`:
    `Positive_new` is the destination prompt there. Spaces around texts are removed, and a positive or negative whose
    two texts are the same (two in the test file) is left out; both are noted.

    Raises `TaskUnreadable` with the row for a file of another shape.
    """
    file = BenchmarkFile(path)
    tasks: list[ContrastTask] = []
    for number, row in enumerate(file.read_csv(_COLUMNS)):
        has_destinations = "Positive_oracle1" in row.fields
        if number == 0 and not has_destinations:
            file.add_note("no columns 'Positive_oracle': 'Positive_new' is the destination prompt", place="line 1")
        kind = row.read_text("Type")
        if kind not in KINDS:
            raise row.build_error(f"'Type' must be {' or '.join(map(repr, KINDS))}, not {kind!r}")
        prompt, old, new = (row.read_text(column) for column in ("Prompt", "Old", "New"))
        generality, specificity = {}, {}
        for i in _TESTED:
            expected = row.read_optional_text(f"Positive_new{i}")
            destination_prompt = row.read_optional_text(f"Positive_oracle{i}") if has_destinations else expected
            generality[f"Positive{i}"] = Contrast(
                prompt=row.read_optional_text(f"Positive{i}"),
                expected=expected,
                other=row.read_optional_text(f"Positive_old{i}"),
                destination_prompt=destination_prompt or expected,
            )
            neighbor = row.read_optional_text(f"Negative{i}")
            other = row.read_optional_text(f"Negative_new{i}")
            specificity[f"Negative{i}"] = Contrast(neighbor, neighbor, other, neighbor)
        task = build_task(
            row,
            source=prompt,
            destination=new,
            efficacy=Contrast(prompt, expected=new, other=old, destination_prompt=row.read_text("Oracle")),
            generality=generality,
            specificity=specificity,
            kind=kind,
        )
        tasks += [task] if task else []
    return file.finish(tasks)
