"""Measure how well the pipeline draws: `python -m demo.llm.evaluate FOLDER` prints top-1 of templates as JSON.

Every concept is drawn by its name in some templates that the transformer was trained on and in some that it was not,
and judged by the emoji model's classifier.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from demo.classify import Classifier, classify, load_classifier
from demo.llm.build import assemble_pipeline
from demo.llm.captions import HELD_OUT
from demo.llm.concepts import CLASSIFIER, read_all_concepts
from demo.llm.draw import GUIDANCE, STEPS, draw_pictures, draw_pictures_directly, load_pipeline

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
    draw: Callable[[Sequence[str], Sequence[int]], Tensor],
    classifier: Classifier,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    each: int,
) -> Result:
    """Draw each concept in `each` of the templates, the next ones for the next concept, and judge the pictures.

    `draw` takes prompts and their seeds.
    """
    asked = [(index, (index * each + turn) % len(templates)) for index in range(len(names)) for turn in range(each)]
    prompts = [templates[template].format(names[index]) for index, template in asked]
    pictures = draw(prompts, range(len(prompts)))
    confidences = classify(pictures, classifier).concept.cpu()
    rows, columns = (torch.tensor(column) for column in zip(*asked, strict=True))
    wanted = torch.tensor([classifier.names.index(name) for name in names])[rows]
    right = (confidences.argmax(1) == wanted).float()
    by_concept = right.view(len(names), each).mean(1)
    return Result(
        pictures=len(prompts),
        confidence=round(confidences[torch.arange(len(rows)), wanted].mean().item(), 4),
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
    parser.add_argument("folder", type=Path, help="the pipeline, or a transformer to make one with")
    parser.add_argument(
        "--each", type=int, default=3, help="templates of either kind for each concept (default: %(default)s)"
    )
    parser.add_argument("--every", type=int, default=1, help="draw only each n-th concept (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a picture (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE, help="0 is without (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--direct", action="store_true", help="draw in large batches, without the pipeline's own loop")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="its weights (default: %(default)s)")
    given = parser.parse_args(arguments)
    is_pipeline = (given.folder / "model_index.json").is_file()
    pipeline = load_pipeline(given.folder) if is_pipeline else assemble_pipeline(given.folder)
    pipeline.to(given.device)
    classifier = load_classifier(given.classifier).to(given.device)
    draw = partial(
        draw_pictures_directly if given.direct else partial(draw_pictures, shown_as="pictures"),
        pipeline,
        steps=given.steps,
        guidance_scale=given.guidance_scale,
    )
    names = [concept.name for concept in read_all_concepts()][:: given.every]
    results = {
        name: evaluate_templates(draw, classifier, names, templates, each=given.each)
        for name, templates in (("trained", TRAINED), ("held_out", HELD_OUT))
    }
    report = {"steps": given.steps, "guidance_scale": given.guidance_scale}
    print(json.dumps(report | {name: asdict(result) for name, result in results.items()}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
