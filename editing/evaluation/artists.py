"""Artists' styles: prompts that imitate them (UCE, Gandikota et al., 2024), to measure what an erasure does to others.

Held-out styles should keep their CLIP score, and their pictures should look as before: a low LPIPS between the pictures
of the base and of the edited model at the same seeds (the paper, section 5.4).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from editing.edits import fill_template, split_template
from editing.errors import EditingError
from editing.evaluation.drawing import Progress, Sampling, draw_in_batches
from editing.evaluation.intervals import Interval
from editing.evaluation.metrics import Clip, PictureDistance
from editing.evaluation.rows import BenchmarkFile, Loaded
from editing.pipelines import EditablePipeline


@dataclass(frozen=True)
class StylePrompt:
    """A picture in the style of an artist."""

    place: str
    """The item of the file."""
    artist: str
    template: str
    seed: int

    @property
    def prompt(self) -> str:
        return fill_template(self.template, self.artist)


def load_artists(path: str | Path) -> Loaded[StylePrompt]:
    """Load the prompts of `artists_edit.json` (400 of 10 artists to erase) or `artists_test.json` (600 of 15 held out).

    Each has its own seed. Templates are not corrected, not even the one with "ofa" for "of a". An artist whose name
    occurs with different capitals would count twice.

    Raises `TaskUnreadable` with the item for a file of another shape.
    """
    file = BenchmarkFile(path)
    prompts = []
    for row in file.read_json():
        artist, template = row.read_text("class name"), row.read_text("text prompt")
        try:
            split_template(template)
        except EditingError as error:
            raise row.build_error(f"'text prompt': {error.detail}") from error
        prompts.append(StylePrompt(row.place, artist, template, row.read_seed("random seed")))
    return file.finish(prompts)


@dataclass(frozen=True)
class StyleScores:
    """Scores of each prompt, in their order."""

    artists: tuple[str, ...]
    base_clip: tuple[float, ...]
    edited_clip: tuple[float, ...]
    lpips: tuple[float, ...] = ()
    """Between the pictures of both models; empty if it was not measured."""

    @property
    def clip_change(self) -> float:
        """Relative change of the mean CLIP score: -0.02 is a loss of 2 %. The base's must not be 0."""
        return fmean(self.edited_clip) / fmean(self.base_clip) - 1

    def average_by_artist(self, scores: Sequence[float]) -> dict[str, float]:
        """Return the mean over each artist's prompts."""
        by_artist: dict[str, list[float]] = defaultdict(list)
        for artist, score in zip(self.artists, scores, strict=True):
            by_artist[artist].append(score)
        return {artist: fmean(own) for artist, own in by_artist.items()}

    def build_rows(self) -> dict[str, dict[str, Interval]]:
        """Return the mean of the artists' means, with its interval over artists: prompts of one are not independent."""

        def average(scores: Sequence[float]) -> Interval:
            return Interval.of(list(self.average_by_artist(scores).values()))

        edited = {"clip": average(self.edited_clip)}
        if any(self.base_clip):
            edited["clip_change"] = Interval(self.clip_change, None)
        if self.lpips:
            edited["lpips"] = average(self.lpips)
        return {"base": {"clip": average(self.base_clip)}, "edited": edited}


def measure_styles(
    base: EditablePipeline,
    edited: EditablePipeline,
    prompts: Sequence[StylePrompt],
    clip: Clip,
    *,
    sampling: Sampling,
    distance: PictureDistance | None = None,
    progress: Progress | None = None,
) -> StyleScores:
    """Draw every prompt with both models at its seed and compare. `distance` is that of LPIPS, if it is measured."""
    texts = [each.prompt for each in prompts]
    seeds = [each.seed for each in prompts]
    before = draw_in_batches(base, texts, seeds=seeds, sampling=sampling)
    after = draw_in_batches(edited, texts, seeds=seeds, sampling=sampling, progress=progress)
    base_clip: list[float] = []
    edited_clip: list[float] = []
    lpips: list[float] = []
    for ones, others in zip(before, after, strict=True):
        batch = texts[len(base_clip) : len(base_clip) + len(ones)]
        base_clip += clip.score(ones, batch).tolist()
        edited_clip += clip.score(others, batch).tolist()
        if distance is not None:
            lpips += distance(ones, others).tolist()
    artists = tuple(each.artist for each in prompts)
    return StyleScores(artists, tuple(base_clip), tuple(edited_clip), tuple(lpips))
