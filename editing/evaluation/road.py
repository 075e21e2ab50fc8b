"""RoAD: roles and appearances to be updated (Arad, Orgad and Belinkov: ReFACT, 2024), as that project ships it."""

from pathlib import Path

from editing.evaluation.contrasts import Contrast, ContrastTask, task
from editing.evaluation.rows import BenchmarkFile, Loaded

KINDS = ("Role", "Appearance")
_TESTED = range(1, 6)
_COLUMNS = (
    *("Type", "Prompt", "Oracle", "Old", "New"),
    *(f"{name}{number}" for number in _TESTED for name in ("Positive", "Positive_old", "Positive_new")),
    *(f"{name}{number}" for number in _TESTED for name in ("Negative", "Negative_new")),
)


def load_road(path: str | Path) -> Loaded[ContrastTask]:
    """The tasks of `RoAD_test.csv` (90) or `RoAD_validation.csv` (10).

    An edit makes `Prompt` ("Canada's Prime Minister"), which shows `Old`, show `New`. The five positives name the same
    thing otherwise, the five negatives its neighbours. The validation file has no `Positive_oracle`: `Positive_new` is
    the destination prompt there. Spaces around texts are taken off, and a positive or negative whose two texts are the
    same (two in the test file) is left out; both are noted.

    Raises `TaskUnreadable` for a file of another shape, with the row.
    """
    file = BenchmarkFile(path)
    tasks: list[ContrastTask] = []
    for number, row in enumerate(file.table(_COLUMNS)):
        has_destinations = "Positive_oracle1" in row.fields
        if number == 0 and not has_destinations:
            file.note("no columns 'Positive_oracle': 'Positive_new' is the destination prompt", place="line 1")
        kind = row.text("Type")
        if kind not in KINDS:
            raise row.error(f"'Type' must be {' or '.join(map(repr, KINDS))}, not {kind!r}")
        prompt, old, new = (row.text(column) for column in ("Prompt", "Old", "New"))
        generality, specificity = {}, {}
        for i in _TESTED:
            positive, neighbour = f"Positive{i}", f"Negative{i}"
            becomes = row.text_or_blank(f"Positive_new{i}")
            destination_prompt = row.text_or_blank(f"Positive_oracle{i}") if has_destinations else becomes
            generality[positive] = Contrast(
                prompt=row.text_or_blank(positive),
                expected=becomes,
                other=row.text_or_blank(f"Positive_old{i}"),
                destination_prompt=destination_prompt or becomes,
            )
            stays = row.text_or_blank(neighbour)
            specificity[neighbour] = Contrast(stays, stays, row.text_or_blank(f"Negative_new{i}"), stays)
        built = task(
            row,
            source=prompt,
            destination=new,
            efficacy=Contrast(prompt, expected=new, other=old, destination_prompt=row.text("Oracle")),
            generality=generality,
            specificity=specificity,
            kind=kind,
        )
        tasks += [built] if built else []
    return file.loaded(tasks)
