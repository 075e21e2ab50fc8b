"""What the pictures show, before and after: the classifier's confidences, the figures and the picture of the demo."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from demo.check import Figures
from demo.classify import Classifier, Confidences, classify
from demo.corrections import HELD_OUT_PROMPT, SEEDS, Correction
from demo.draw import draw_pictures
from editing.pictures.grid import GridRow, draw_grid

Report = dict[str, Any]
SHOWN = 5  # pictures of a row
Advance = Callable[[int], None]


@dataclass(frozen=True)
class PictureRequests:
    """Prompts and seeds, pair by pair; one picture each."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[str]) -> "PictureRequests":
        """Every prompt with every seed, seed by seed."""
        pairs = [(prompt, seed) for seed in SEEDS for prompt in prompts]
        return cls(tuple(prompt for prompt, _ in pairs), tuple(seed for _, seed in pairs))


@dataclass(frozen=True)
class Seen:
    """The pictures of one question, (n, 3, h, w) in [-1, 1], and what the classifier says of them."""

    pictures: Tensor
    confidences: Confidences

    def concept(self, name: str) -> float:
        return float(self.confidences.of_concept(name).mean())

    def style(self, name: str) -> float:
        return float(self.confidences.of_style(name).mean())

    def images(self) -> list[Image.Image]:
        """The first few as pictures."""
        return as_images(self.pictures[:SHOWN])


def as_images(pictures: Tensor) -> list[Image.Image]:
    """(n, 3, h, w) in [-1, 1] as pictures."""
    pixels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture.contiguous().numpy()) for picture in pixels]


@dataclass(frozen=True)
class Judgement:
    """What one pipeline draws for each edit and for each held-out concept."""

    corrections: tuple[Seen, ...]
    held_out: dict[str, Seen]


def judge(
    pipeline: StableDiffusionPipeline,
    classifier: Classifier,
    *,
    corrections: Sequence[Correction],
    held_out: Sequence[str],
    advance: Advance,
) -> Judgement:
    """Draw everything with one pipeline and classify it; `advance` is told how many pictures were drawn."""

    def draw_and_classify(prompts: Sequence[str]) -> Seen:
        asked = PictureRequests.of(prompts)
        pictures = draw_pictures(pipeline, asked.prompts, asked.seeds)
        advance(len(asked.prompts))
        return Seen(pictures, classify(pictures, classifier))

    seen = tuple(draw_and_classify(correction.prompts()) for correction in corrections)
    return Judgement(
        seen, _by_concept(draw_and_classify([HELD_OUT_PROMPT.format(name) for name in held_out]), held_out)
    )


def picture_count(corrections: Sequence[Correction], held_out: Sequence[str]) -> int:
    """How many pictures `judge` draws."""
    return len(SEEDS) * (sum(len(correction.prompts()) for correction in corrections) + len(held_out))


def report_of(corrections: Sequence[Correction], *, before: Judgement, after: Judgement) -> Report:
    """The figures of `report.json` that pictures give."""
    edits = []
    for correction, then, now in zip(corrections, before.corrections, after.corrections, strict=True):
        measured = _measure(correction, then)
        edits.append(
            {
                "source": correction.source,
                "destination": correction.destination,
                "kind": correction.kind,
                "before": measured(then),
                "after": measured(now),
            }
        )
    return {"edits": edits, "holdout": {"before": _held_out(before), "after": _held_out(after)}}


def _measure(correction: Correction, before: Seen) -> Callable[[Seen], dict[str, float | None]]:
    """Return how to judge an edit's pictures by their mean confidence.

    An erased style has its own head and no destination. A word that the model misunderstands is no class of its own:
    its "source" is the concept that the base model draws for it instead.
    """
    if correction.destination is None:
        return lambda seen: {"source": seen.style(correction.source), "destination": None}
    destination = correction.destination
    source = correction.source
    if source not in before.confidences.classes.concepts:
        means = before.confidences.concept.mean(0).clone()
        means[before.confidences.classes.concepts.index(destination)] = -1
        source = before.confidences.classes.concepts[int(means.argmax())]
    return lambda seen: {"source": seen.concept(source), "destination": seen.concept(destination)}


def _held_out(judgement: Judgement) -> float:
    return mean(seen.concept(name) for name, seen in judgement.held_out.items())


def _by_concept(seen: Seen, names: Sequence[str]) -> dict[str, Seen]:
    """The pictures of each concept, which were drawn seed by seed."""
    every = seen.confidences
    return {
        name: Seen(
            seen.pictures[index :: len(names)],
            Confidences(
                every.concept[index :: len(names)],
                every.style[index :: len(names)],
                every.gender[index :: len(names)],
                every.classes,
            ),
        )
        for index, name in enumerate(names)
    }


def save_picture(
    path: Path, corrections: Sequence[Correction], *, before: Judgement, after: Judgement, title: str
) -> None:
    """`before-after.png`: a row for each edit, then rows of held-out concepts."""
    rows: dict[str, list[GridRow]] = {}
    headings = {
        "concept": "One concept for another",
        "alias": "A word that was misunderstood",
        "images": "Shown by reference images",
        "style": "A style erased",
    }
    for correction, then, now in zip(corrections, before.corrections, after.corrections, strict=True):
        goal = f"to {correction.destination}" if correction.destination else "erased"
        row = GridRow(correction.source, goal, then.images(), now.images())
        rows.setdefault(headings[correction.kind], []).append(row)
    names = list(before.held_out)
    untouched = []
    for start in range(0, 4 * SHOWN, SHOWN):
        chosen = names[start : start + SHOWN]
        pictures = ([judgement.held_out[name].images()[0] for name in chosen] for judgement in (before, after))
        untouched.append(GridRow("held out", ", ".join(chosen), *pictures))
    sections = [*rows.items(), ("Not edited", untouched)]
    draw_grid(title, sections).save(path)


def print_figures(report: Report, console: Console) -> None:
    """The confidences as a table, and what the demo is meant to show beneath it."""
    table = Table("kind", "source", "destination", "source before", "after", "destination before", "after")
    for edit in report["edits"]:
        facts = [edit["kind"], edit["source"], edit["destination"] or "(erased)"]
        for what in ("source", "destination"):
            facts += ["" if edit[when][what] is None else f"{edit[when][what]:.2f}" for when in ("before", "after")]
        table.add_row(*facts)
    console.print(table)
    figures = Figures.of(report)
    console.print(f"destination, mean rise    {figures.destinations:+.3f} over {figures.replaced} edits")
    console.print(f"erased style, change      {figures.erasure:+.3f}")
    console.print(f"held-out concepts, change {figures.holdout:+.3f} from {report['holdout']['before']:.3f}")
    check = report["check"]
    console.print(f"the service's own check   {check['succeeded']} of {check['evaluated']} evaluated edits succeeded")
    console.print(f"pulled sha256             {report['pulled']['sha256']}, as published")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())
    console.print(f"seconds                   {seconds}")
    console.print(f"peak memory               {report['peak_memory_mb']} MB, all processes together")
