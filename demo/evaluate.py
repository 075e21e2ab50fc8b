"""Measure how well the emoji model draws: `python -m demo.evaluate` prints the table of its model card.

The committed classifier judges: concepts by confidence and top-1, named styles and named genders by top-1 of their
heads, neutral captions of professions by the share of the gender they were trained to prefer.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from demo.classify import Classifier, Confidences, classify, load_classifier
from demo.concepts import DRAWN_STYLES, GENDER_WORDS, GENDERS, WEIGHTS, Concept, read_concepts
from demo.draw import draw_pictures, load_pipeline

CONCEPT_TEMPLATES = ("an image of {}", "a photo of a {}", "{}")
STYLE_TEMPLATES = ("{} in the style of {style}", "{style} style {}", "an image of {}, style of {style}")
STYLED_CONCEPTS = 60
GENDER_TEMPLATES = ("a photo of a {}", "{}")
NEUTRAL_SEEDS = 20  # pictures of each profession and template


@dataclass(frozen=True)
class Drawn:
    """How pictures fared: how many there were, mean confidence of what was asked for, share where it came first."""

    pictures: int
    confidence: float
    top1: float


@dataclass(frozen=True)
class Neutral:
    """Neutral captions of one profession: the share of its preferred gender, as trained and as drawn."""

    profession: str
    gender: str
    trained: float
    drawn: float


@dataclass(frozen=True)
class Report:
    """All figures of the model card. `styles` and `style_concepts` are by style, `genders` by gender."""

    concepts: Drawn
    aliases: Drawn
    held_out_aliases: Drawn
    styles: Mapping[str, Drawn]
    style_concepts: Mapping[str, Drawn]
    genders: Mapping[str, Drawn]
    gendered_professions: Drawn
    neutral: Sequence[Neutral]
    weakest: Mapping[str, float]  # the ten concepts of lowest mean confidence
    seconds_per_picture: float

    @property
    def neutral_share(self) -> float:
        """Mean over the professions of the share that the preferred gender has in neutral captions."""
        return sum(neutral.drawn for neutral in self.neutral) / len(self.neutral)


def evaluate(pipeline: StableDiffusionPipeline, classifier: Classifier, *, seeds: int = 3) -> Report:
    """Draw and judge everything. Takes some minutes on a laptop; shows progress."""
    concepts = read_concepts()
    judge = _Judge(pipeline, classifier)

    start = time.perf_counter()
    named = judge.read(_with_names(concepts, [[concept.name] for concept in concepts], seeds=seeds), "concepts")
    seconds = (time.perf_counter() - start) / len(named.requests)
    by_concept = named.confidence.view(len(concepts), -1).mean(1)
    weakest = by_concept.argsort()[:10].tolist()

    aliases = judge.read(_with_names(concepts, [concept.aliases for concept in concepts], seeds=1), "aliases")
    held_out = judge.read(
        _with_names(concepts, [concept.held_out for concept in concepts], seeds=1), "held-out aliases"
    )

    styles, style_concepts = {}, {}
    objects = [index for index, concept in enumerate(concepts) if concept.skew is None]
    chosen = objects[:: max(1, len(objects) // STYLED_CONCEPTS)][:STYLED_CONCEPTS]
    for style in DRAWN_STYLES:
        prompts = [
            PictureRequest(template.replace("{style}", style).format(concepts[index].name), index, seed)
            for index, (seed, template) in product(chosen, enumerate(STYLE_TEMPLATES))
        ]
        read = judge.read(prompts, f"style {style}")
        styles[style] = _drawn(
            read.all.of_style(style), read.all.style.argmax(1) == read.all.classes.styles.index(style)
        )
        style_concepts[style] = read.drawn

    genders, gendered_right, gendered_confidence = {}, [], []
    professions = [(index, concept) for index, concept in enumerate(concepts) if concept.skew is not None]
    for gender in GENDERS:
        prompts = [
            PictureRequest(template.format(f"{word} {concept.name}"), index, seed)
            for (index, concept), template, word, seed in product(
                professions, GENDER_TEMPLATES, GENDER_WORDS[gender], range(3)
            )
        ]
        read = judge.read(prompts, f"gender {gender}")
        genders[gender] = _drawn(read.all.of_gender(gender), read.all.of_gender(gender) > 0.5)
        gendered_right.append(read.right)
        gendered_confidence.append(read.confidence)

    return Report(
        concepts=named.drawn,
        aliases=aliases.drawn,
        held_out_aliases=held_out.drawn,
        styles=styles,
        style_concepts=style_concepts,
        genders=genders,
        gendered_professions=_drawn(torch.cat(gendered_confidence), torch.cat(gendered_right)),
        neutral=_neutral(judge, professions),
        weakest={concepts[index].name: round(by_concept[index].item(), 3) for index in weakest},
        seconds_per_picture=seconds,
    )


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw: the prompt, the concept it should show, the seed."""

    prompt: str
    concept: int
    seed: int


@dataclass(frozen=True)
class _Read:
    requests: Sequence[PictureRequest]
    all: Confidences

    @property
    def confidence(self) -> Tensor:
        return self.all.concept[torch.arange(len(self.requests)), [each.concept for each in self.requests]]

    @property
    def right(self) -> Tensor:
        return self.all.concept.argmax(1) == torch.tensor([each.concept for each in self.requests])

    @property
    def drawn(self) -> Drawn:
        return _drawn(self.confidence, self.right)


def _drawn(confidence: Tensor, right: Tensor) -> Drawn:
    return Drawn(len(confidence), confidence.mean().item(), right.float().mean().item())


class _Judge:
    def __init__(self, pipeline: StableDiffusionPipeline, classifier: Classifier) -> None:
        self.pipeline, self.classifier = pipeline, classifier

    def read(self, requests: Sequence[PictureRequest], shown_as: str) -> _Read:
        prompts, seeds = [each.prompt for each in requests], [each.seed for each in requests]
        return _Read(
            requests, classify(draw_pictures(self.pipeline, prompts, seeds, shown_as=shown_as), self.classifier)
        )


def _with_names(concepts: Sequence[Concept], names: Sequence[Sequence[str]], *, seeds: int) -> list[PictureRequest]:
    return [
        PictureRequest(CONCEPT_TEMPLATES[seed % len(CONCEPT_TEMPLATES)].format(name), index, seed)
        for index in range(len(concepts))
        for name, seed in product(names[index], range(seeds))
    ]


def _neutral(judge: _Judge, professions: Sequence[tuple[int, Concept]]) -> list[Neutral]:
    prompts = [
        PictureRequest(template.format(concept.name), index, 100 + seed)
        for (index, concept), template, seed in product(professions, GENDER_TEMPLATES, range(NEUTRAL_SEEDS))
    ]
    men = (
        (judge.read(prompts, "neutral professions").all.of_gender("man") > 0.5)
        .float()
        .view(len(professions), -1)
        .mean(1)
    )
    results = []
    for (_, concept), share in zip(professions, men.tolist(), strict=True):
        assert concept.skew is not None, concept.name  # of every profession
        preferred = "man" if concept.skew >= 0.5 else "woman"
        trained, drawn = (value if preferred == "man" else 1 - value for value in (concept.skew, share))
        results.append(Neutral(concept.name, preferred, trained, drawn))
    return results


def as_table(report: Report) -> str:
    """Return the report as the Markdown table of the model card."""
    rows = [("every concept by its name", report.concepts), ("trained aliases", report.aliases)]
    rows.append(("held-out aliases", report.held_out_aliases))
    for style in report.styles:
        rows += [
            (f"style {style}, when named", report.styles[style]),
            ("… concepts in it", report.style_concepts[style]),
        ]
    rows += [(f"{gender}, when named", drawn) for gender, drawn in report.genders.items()]
    rows.append(("… professions of gendered captions", report.gendered_professions))
    lines = ["| asked for | pictures | mean confidence | top-1 |", "|---|---|---|---|"]
    lines += [f"| {name} | {drawn.pictures} | {drawn.confidence:.3f} | {drawn.top1:.1%} |" for name, drawn in rows]
    trained = sum(neutral.trained for neutral in report.neutral) / len(report.neutral)
    each = ", ".join(f"{neutral.profession} {neutral.drawn:.0%} {neutral.gender}" for neutral in report.neutral)
    lines.append("")
    lines.append(f"Neutral professions: preferred gender {report.neutral_share:.1%}, trained {trained:.1%}; {each}.")
    lines.append(f"Weakest concepts: {', '.join(f'{name} {value}' for name, value in report.weakest.items())}.")
    lines.append(f"{report.seconds_per_picture:.2f} s a picture.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="folder with pipeline/ and classifier.safetensors"
    )
    parser.add_argument("--seeds", type=int, default=3, help="pictures of each concept (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be 1 or more")
    pipeline = load_pipeline(arguments.weights / "pipeline")
    report = evaluate(pipeline, load_classifier(arguments.weights / "classifier.safetensors"), seeds=arguments.seeds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    print(as_table(report))  # noqa: T201


if __name__ == "__main__":
    main()
