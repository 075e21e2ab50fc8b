"""What RoAD and TIMED share: pictures that CLIP must find nearer to one text than to another, counted as win rates."""

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
    """One prompt, won where its picture is nearer to the text expected than to the other."""

    prompt: str
    expected: str
    other: str
    destination_prompt: str
    """The prompt in whose place the unedited model may be asked, to know how well the judge can tell."""


@dataclass(frozen=True)
class ContrastTask:
    """One edit, and what tells whether it took.

    Each task is an edit by itself: some sources occur in several tasks with different destinations.
    """

    place: str
    """The line of the file."""
    source: str
    destination: str
    efficacy: Contrast
    """The edited prompt itself."""
    generality: tuple[Contrast, ...]
    """Prompts about the source that the edit did not see: they should follow."""
    specificity: tuple[Contrast, ...]
    """Prompts about its neighbours: they should stay."""
    kind: str = ""
    """RoAD's "Role" or "Appearance"."""


@dataclass(frozen=True)
class WinRates:
    """Shares of won contrasts in 0..1: each the mean over tasks of a task's mean over its prompts and one seed."""

    efficacy: float
    generality: float
    specificity: float

    @property
    def f1_harmonic(self) -> float:
        """Of generality and specificity, as the benchmarks' published code computes it."""
        total = self.generality + self.specificity
        return 2 * self.generality * self.specificity / total if total else 0.0

    @property
    def f1_arithmetic(self) -> float:
        """Their mean, as the paper (EMCID) reports it (appendix H)."""
        return (self.generality + self.specificity) / 2

    def figures(self) -> dict[str, float]:
        return {
            "efficacy": self.efficacy,
            "generality": self.generality,
            "specificity": self.specificity,
            "f1_harmonic": self.f1_harmonic,
            "f1_arithmetic": self.f1_arithmetic,
        }


def decidable(row: Row, contrasts: dict[str, Contrast]) -> tuple[Contrast, ...]:
    """The contrasts, by their column, that somebody can win: whose prompt is there and whose two texts differ.

    The others are left out and noted. CLIP's tokenizer does not tell capitals from small letters.
    """
    kept = []
    for column, contrast in contrasts.items():
        if not all((contrast.prompt, contrast.expected, contrast.other)):
            row.note(f"{column!r} left out: its prompt or one of its texts is blank")
        elif contrast.expected.casefold() == contrast.other.casefold():
            row.note(f"{column!r} left out: nothing tells {contrast.expected!r} from {contrast.other!r}")
        else:
            kept.append(contrast)
    return tuple(kept)


def task(
    row: Row,
    *,
    source: str,
    destination: str,
    efficacy: Contrast,
    generality: dict[str, Contrast],
    specificity: dict[str, Contrast],
    kind: str = "",
) -> ContrastTask | None:
    """A task of what can be decided of a row, or None, noted, where the edit changes nothing or too little is left."""
    if not decidable(row, {"the edit": efficacy}):
        return None
    kept = decidable(row, generality), decidable(row, specificity)
    if not all(kept):
        row.note("the row left out: no prompt of generality or none of specificity is left")
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
    """The win rates of each seed: every prompt of every task drawn once a seed.

    The pipeline is whatever is to be judged: the base, or one edited for these tasks, each in its turn as the
    benchmarks do it or all at once. With `destination_prompts` each contrast's destination prompt is drawn.
    """
    contrasts = [contrast for task in tasks for contrast in (task.efficacy, *task.generality, *task.specificity)]
    prompts = [contrast.destination_prompt if destination_prompts else contrast.prompt for contrast in contrasts]
    rates = []
    for seed in seeds:
        won: list[bool] = []
        for pictures in draw_in_batches(
            pipeline, prompts, seeds=[seed] * len(prompts), sampling=sampling, progress=progress
        ):
            judged = contrasts[len(won) : len(won) + len(pictures)]
            expected, others = [contrast.expected for contrast in judged], [contrast.other for contrast in judged]
            won += clip.prefers(pictures, expected, others).tolist()
        rates.append(win_rates(tasks, won))
    return rates


def win_rates(tasks: Sequence[ContrastTask], won: Sequence[bool]) -> WinRates:
    """From what was won of each task's efficacy, generality and specificity, one after another."""
    verdicts: Iterator[bool] = iter(won)
    efficacy, generality, specificity = [], [], []
    for task in tasks:
        efficacy.append(float(next(verdicts)))
        generality.append(fmean(next(verdicts) for _ in task.generality))
        specificity.append(fmean(next(verdicts) for _ in task.specificity))
    return WinRates(fmean(efficacy), fmean(generality), fmean(specificity))


def over_seeds(rates: Sequence[WinRates]) -> dict[str, Interval]:
    """Each figure's mean over the seeds with its 95 % confidence interval."""
    figures = [rate.figures() for rate in rates]
    return {name: Interval.of([figure[name] for figure in figures]) for name in figures[0]}
