"""Measure how well the pipeline draws: `python -m demo.sd3.evaluate FOLDER` prints top-1 of templates as JSON.

Every concept is drawn by its name in some templates that the pipeline was trained on and in some that it was not, and
judged by the emoji model's classifier.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from demo.classify import load_classifier
from demo.concepts import read_concepts
from demo.llm.captions import HELD_OUT
from demo.llm.evaluate import evaluate_templates
from demo.sd3.data import read_drawn
from demo.sd3.draw import FOLDER, GUIDANCE, STEPS, draw_pictures, load_pipeline
from demo.sd3.pipeline import PIPELINE_LENGTH, T5_LENGTH

TRAINED = ("a photo of a {}", "{}", "an image of a {}", "a {} on a white background")


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
    drawn = read_drawn()
    names = [concept.name for concept in read_concepts() if concept.name in drawn][: given.concepts]
    cases = (
        ("trained", TRAINED, given.each, T5_LENGTH),
        ("held_out", HELD_OUT, given.each, T5_LENGTH),
        ("held_out_at_256_tokens", HELD_OUT, 1, PIPELINE_LENGTH),
    )
    for name, templates, each, length in cases:
        draw = partial(draw_pictures, pipeline, length=length, **options)
        report[name] = asdict(evaluate_templates(draw, classifier, names, templates, each=each))
    print(json.dumps(report | {"seconds": time.perf_counter() - started}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
