"""Measure how well the pipeline draws: `python -m demo.sd3.evaluate FOLDER` prints top-1 of templates as JSON.

Every concept is drawn by its name in some templates that the pipeline was trained on and in some that it was not, and
judged by the emoji model's classifier.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from demo.classify import Classifier, classify, load_classifier
from demo.concepts import read_concepts
from demo.llm.captions import HELD_OUT
from demo.sd3.data import read_drawn
from demo.sd3.draw import FOLDER, GUIDANCE, STEPS, draw_pictures, load_pipeline
from demo.sd3.pipeline import PIPELINE_LENGTH, T5_LENGTH

TRAINED = ("a photo of a {}", "{}", "an image of a {}", "a {} on a white background")


def evaluate_templates(
    pipeline: StableDiffusion3Pipeline,
    classifier: Classifier,
    templates: Sequence[str],
    *,
    each: int,
    concepts: int | None = None,
    **options: int | float,
) -> dict[str, object]:
    """Draw concepts in `each` of the templates, the next ones for the next concept, and judge the pictures."""
    drawn = read_drawn()
    names = [concept.name for concept in read_concepts() if concept.name in drawn][:concepts]
    asked = [(index, (index * each + turn) % len(templates)) for index in range(len(names)) for turn in range(each)]
    prompts = [templates[template].format(names[index]) for index, template in asked]
    pictures: Tensor = draw_pictures(pipeline, prompts, range(len(prompts)), **options)  # type: ignore[arg-type]
    confidences = classify(pictures, classifier).concept
    rows, columns = (torch.tensor(column) for column in zip(*asked, strict=True))
    shown = torch.tensor([classifier.names.index(name) for name in names])[rows]
    right = (confidences.argmax(1) == shown).float()
    by_concept = right.view(len(names), each).mean(1)
    return {
        "pictures": len(prompts),
        "confidence": round(confidences[torch.arange(len(rows)), shown].mean().item(), 4),
        "top1": round(right.mean().item(), 4),
        "by_template": {
            template: round(right[columns == index].mean().item(), 3)
            for index, template in enumerate(templates)
            if (columns == index).any()
        },
        "weakest": {
            names[index]: round(by_concept[index].item(), 3)
            for index in by_concept.argsort()[:10].tolist()
            if by_concept[index] < 1
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.sd3.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="the pipeline (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--each", type=int, default=3, help="templates of either kind for each concept (default: %(default)s)"
    )
    parser.add_argument("--concepts", type=int, help="the first concepts only")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a picture (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE, help="1 is without (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="pictures at a time")
    given = parser.parse_args(arguments)
    batch = given.batch or (32 if given.device == "cpu" else 512)
    pipeline, classifier = load_pipeline(given.folder, device=given.device), load_classifier()
    started = time.perf_counter()
    options = {"steps": given.steps, "guidance_scale": given.guidance_scale, "batch": batch}
    report: dict[str, object] = dict(options)
    cases = (
        ("trained", TRAINED, given.each, T5_LENGTH),
        ("held_out", HELD_OUT, given.each, T5_LENGTH),
        ("held_out_at_256_tokens", HELD_OUT, 1, PIPELINE_LENGTH),
    )
    for name, templates, each, length in cases:
        report[name] = evaluate_templates(
            pipeline, classifier, templates, each=each, concepts=given.concepts, length=length, **options
        )
    print(json.dumps(report | {"seconds": time.perf_counter() - started}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
