"""Gender in pictures of professions: 37 of WinoBias with TIME's prompts (Orgad, Kawar and Belinkov, 2023).

Δ_p = |F_p - 50| / 50, where F_p is the percentage of a profession's pictures that CLIP finds nearer to "a female …"
than to "a male …": 0 is balance, 1 is one gender alone. The benchmark's figure is the mean over professions (the paper,
appendix G and Table 6).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from editing.errors import InvalidEdit
from editing.evaluation.drawing import Progress, Sampling, draw_in_batches
from editing.evaluation.metrics import Clip
from editing.evaluation.rows import BenchmarkFile, Loaded
from editing.pipelines import EditablePipeline

PICTURES = 250
"""Pictures of each profession, as in the paper."""

_TESTED = tuple(f"ex{number}" for number in range(1, 6))
_COLUMNS = ("female", "male", "old", "new", "validation", *_TESTED)


@dataclass(frozen=True)
class Profession:
    place: str
    """The line of the file."""
    source: str
    """The profession with its article, "a doctor": the source of an edit."""
    female: str
    male: str
    counter_stereotype: str
    """TIME's destination: the gender that models draw less often."""
    validation: str
    """A prompt to choose settings with."""
    prompts: tuple[str, ...]
    """Prompts to test with."""


def load_professions(path: str | Path) -> Loaded[Profession]:
    """Load the professions of `TIMED_gender_test_set_processed.csv` (37).

    Raises `TaskUnreadable` with the row for a file of another shape.
    """
    file = BenchmarkFile(path)
    professions: list[Profession] = []
    for row in file.read_csv(_COLUMNS):
        source, female, male, new = (row.read_text(column) for column in ("old", "female", "male", "new"))
        if female.casefold() == male.casefold():
            raise row.build_error("'female' and 'male' are the same text")
        if new not in (female, male):
            raise row.build_error(f"'new' must be the text of 'female' or of 'male', not {new!r}")
        if any(known.source == source for known in professions):
            row.add_note(f"the row left out: {source!r} occurs before")
            continue
        prompts = tuple(row.read_text(column) for column in _TESTED)
        professions.append(Profession(row.place, source, female, male, new, row.read_text("validation"), prompts))
    return file.finish(professions)


def compute_imbalance(female_share: float) -> float:
    """Return Δ_p = |F_p - 50| / 50 of a share F_p in 0..1."""
    return abs(100 * female_share - 50) / 50


@dataclass(frozen=True)
class GenderBalance:
    """The share of women in 0..1 in each profession's pictures, by its source."""

    female_shares: Mapping[str, float]

    @property
    def imbalances(self) -> dict[str, float]:
        """Δ_p of each profession."""
        return {source: compute_imbalance(share) for source, share in self.female_shares.items()}

    @property
    def delta(self) -> float:
        """The mean of Δ_p over the professions."""
        return fmean(self.imbalances.values())


def measure_balance(
    pipeline: EditablePipeline,
    professions: Sequence[Profession],
    clip: Clip,
    *,
    pictures: int = PICTURES,
    run: int = 0,
    sampling: Sampling,
    progress: Progress | None = None,
) -> GenderBalance:
    """Draw `pictures` of each profession, its test prompts in turn, and let CLIP tell women from men.

    The seeds are `run · pictures` and those after it: runs of one size share none, and all professions use the same.
    """
    if pictures < 1:
        raise InvalidEdit(f"pictures must be at least 1, not {pictures}", pointer="/pictures")
    drawn = [profession for profession in professions for _ in range(pictures)]
    prompts = [each.prompts[number % len(each.prompts)] for each in professions for number in range(pictures)]
    seeds = [run * pictures + number for _ in professions for number in range(pictures)]
    women: list[bool] = []
    for batch in draw_in_batches(pipeline, prompts, seeds=seeds, sampling=sampling, progress=progress):
        shown = drawn[len(women) : len(women) + len(batch)]
        women += clip.prefers(batch, [each.female for each in shown], [each.male for each in shown]).tolist()
    shares = [fmean(women[start : start + pictures]) for start in range(0, len(women), pictures)]
    return GenderBalance({each.source: share for each, share in zip(professions, shares, strict=True)})
