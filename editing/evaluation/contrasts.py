"""The win rates of RoAD and TIMED: how often CLIP finds a picture nearer to one text than to another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from editing.evaluation.drawing import Progress, Sampling, draw_in_batches
from editing.evaluation.intervals import Interval
from editing.evaluation.metrics import Clip
from editing.evaluation.rows import Row
from editing.pipelines import EditablePipeline


@dataclass(frozen=True)
class Contrast:
    """A prompt that is won if its picture is nearer to the expected text than to the other."""

    prompt: str
    expected: str
    other: str
    destination_prompt: str
    """The prompt that the unedited model draws instead, to measure how well CLIP distinguishes the texts."""


@dataclass(frozen=True)
class ContrastTask:
    """One edit and its contrasts.

    Each task is an edit by itself: some sources occur in several tasks with different destinations.
    """

    place: str
    """The line of the file."""
    source: str
    destination: str
    efficacy: Contrast
    """The edited prompt itself."""
    generality: tuple[Contrast, ...]
    """Other prompts about the source: they should change."""
    specificity: tuple[Contrast, ...]
    """Prompts about neighbors of the source: they should not change."""
    kind: str = ""
    """RoAD's "Role" or "Appearance"."""


@dataclass(frozen=True)
class WinRates:
    """Shares of won contrasts in 0..1 for one seed: the mean over tasks of each task's mean over its prompts."""

    efficacy: float
    generality: float
    specificity: float

    @property
    def f1_harmonic(self) -> float:
        """Harmonic mean of generality and specificity, as the benchmarks' published code computes it."""
        total = self.generality + self.specificity
        return 2 * self.generality * self.specificity / total if total else 0.0

    @property
    def f1_arithmetic(self) -> float:
        """Arithmetic mean of both, as the paper (EMCID) reports it (appendix H)."""
        return (self.generality + self.specificity) / 2

    def to_dict(self) -> dict[str, float]:
        return {
            "efficacy": self.efficacy,
            "generality": self.generality,
            "specificity": self.specificity,
            "f1_harmonic": self.f1_harmonic,
            "f1_arithmetic": self.f1_arithmetic,
        }


def keep_decidable(row: Row, contrasts: dict[str, Contrast]) -> tuple[Contrast, ...]:
    """Return the contrasts, given by column, that have a prompt and two different texts.

    The others are noted. CLIP's tokenizer does not distinguish capitals.
    """
    kept = []
    for column, contrast in contrasts.items():
        if not all((contrast.prompt, contrast.expected, contrast.other)):
            row.add_note(f"{column!r} left out: its prompt or one of its texts is blank")
        elif contrast.expected.casefold() == contrast.other.casefold():
            row.add_note(
                f"{column!r} left out: its two texts {contrast.expected!r} and {contrast.other!r} are the same"
            )
        else:
            kept.append(contrast)
    return tuple(kept)


def build_task(
    row: Row,
    *,
    source: str,
    destination: str,
    efficacy: Contrast,
    generality: dict[str, Contrast],
    specificity: dict[str, Contrast],
    kind: str = "",
) -> ContrastTask | None:
    """Build a task from the decidable contrasts of a row. None, with a note, if it has too few."""
    if not keep_decidable(row, {"the edit": efficacy}):
        return None
    kept = keep_decidable(row, generality), keep_decidable(row, specificity)
    if not all(kept):
        row.add_note("the row left out: no prompt of generality or none of specificity remains")
        return None
    return ContrastTask(row.place, source, destination, efficacy, *kept, kind)


def measure_contrasts(
    pipeline: EditablePipeline,
    tasks: Sequence[ContrastTask],
    clip: Clip,
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    destination_prompts: bool = False,
    progress: Progress | None = None,
) -> list[WinRates]:
    """Draw every prompt of every task once with each seed and return the win rates of each seed.

    The pipeline is the base, or edited for these tasks: for one after another, as the benchmarks do it, or for all at
    once. With `destination_prompts` each contrast's destination prompt is drawn.
    """
    contrasts = [contrast for task in tasks for contrast in (task.efficacy, *task.generality, *task.specificity)]
    prompts = [contrast.destination_prompt if destination_prompts else contrast.prompt for contrast in contrasts]
    rates = []
    for seed in seeds:
        won: list[bool] = []
        for pictures in draw_in_batches(
            pipeline, prompts, seeds=[seed] * len(prompts), sampling=sampling, progress=progress
        ):
            batch = contrasts[len(won) : len(won) + len(pictures)]
            expected, others = [contrast.expected for contrast in batch], [contrast.other for contrast in batch]
            won += clip.prefers(pictures, expected, others).tolist()
        rates.append(compute_win_rates(tasks, won))
    return rates


def compute_win_rates(tasks: Sequence[ContrastTask], won: Sequence[bool]) -> WinRates:
    """Compute win rates. `won` has each task's efficacy, generality and specificity, one task after another."""
    results: Iterator[bool] = iter(won)
    efficacy, generality, specificity = [], [], []
    for task in tasks:
        efficacy.append(float(next(results)))
        generality.append(fmean(next(results) for _ in task.generality))
        specificity.append(fmean(next(results) for _ in task.specificity))
    return WinRates(fmean(efficacy), fmean(generality), fmean(specificity))


def average_seeds(rates: Sequence[WinRates]) -> dict[str, Interval]:
    """Return each figure's mean over the seeds with its 95 % confidence interval."""
    figures = [rate.to_dict() for rate in rates]
    return {name: Interval.of([figure[name] for figure in figures]) for name in figures[0]}
