"""Measure how well the pipeline draws: `python -m demo.llm.evaluate FOLDER` prints top-1 of templates as JSON.

Every concept is drawn by its name in some templates that the transformer was trained on and in some that it was not,
and judged by the emoji model's classifier.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import ZImagePipeline

from demo.classify import Classifier, classify, load_classifier
from demo.concepts import read_concepts
from demo.llm.captions import HELD_OUT
from demo.llm.draw import GUIDANCE, STEPS, draw_pictures, load_pipeline

TRAINED = ("a photo of a {}", "{}", "an image of {}", "a {} on a white background")


@dataclass(frozen=True)
class Result:
    """How pictures fared: how many, mean confidence of what was asked for, share where it came first."""

    pictures: int
    confidence: float
    top1: float
    by_template: dict[str, float]
    weakest: dict[str, float]  # top-1 of the concepts that fare worst


def evaluate_templates(
    pipeline: ZImagePipeline,
    classifier: Classifier,
    templates: Sequence[str],
    *,
    each: int,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
) -> Result:
    """Draw every concept in `each` of the templates, the next ones for the next concept, and judge the pictures."""
    names = [concept.name for concept in read_concepts()]
    asked = [(index, (index * each + turn) % len(templates)) for index in range(len(names)) for turn in range(each)]
    prompts = [templates[template].format(names[index]) for index, template in asked]
    pictures = draw_pictures(
        pipeline, prompts, range(len(prompts)), steps=steps, guidance_scale=guidance_scale, shown_as="pictures"
    )
    confidences = classify(pictures, classifier).concept
    rows, columns = (torch.tensor(column) for column in zip(*asked, strict=True))
    right = (confidences.argmax(1) == rows).float()
    by_concept = right.view(len(names), each).mean(1)
    return Result(
        pictures=len(prompts),
        confidence=round(confidences[torch.arange(len(rows)), rows].mean().item(), 4),
        top1=round(right.mean().item(), 4),
        by_template={
            template: round(right[columns == index].mean().item(), 3)
            for index, template in enumerate(templates)
            if (columns == index).any()
        },
        weakest={
            names[index]: round(by_concept[index].item(), 3)
            for index in by_concept.argsort()[:10].tolist()
            if by_concept[index] < 1
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.llm.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the pipeline, as `python -m demo.llm.build` writes it")
    parser.add_argument(
        "--each", type=int, default=3, help="templates of either kind for each concept (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of a picture (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE, help="0 is without (default: %(default)s)")
    given = parser.parse_args(arguments)
    pipeline, classifier = load_pipeline(given.folder), load_classifier()
    results = {
        name: evaluate_templates(
            pipeline,
            classifier,
            templates,
            each=given.each,
            steps=given.steps,
            guidance_scale=given.guidance_scale,
        )
        for name, templates in (("trained", TRAINED), ("held_out", HELD_OUT))
    }
    report = {"steps": given.steps, "guidance_scale": given.guidance_scale}
    print(json.dumps(report | {name: asdict(result) for name, result in results.items()}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
