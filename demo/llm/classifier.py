"""Train the classifier of all concepts: `python -m demo.llm.classifier`. Interrupted training goes on.

It is the emoji model's classifier with more classes, on the same five styles. The last line of the output is JSON:
the share of pictures whose concept comes first, as drawn and as the autoencoder gives them back.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from demo import art
from demo.art import Art
from demo.classify import Classifier
from demo.llm.build import load_autoencoder
from demo.llm.concepts import CLASSIFIER, read_all_concepts
from demo.train import classifier
from demo.train.grid import as_floats
from demo.train.loop import Schedule

NAME = "llm-classifier"
SCHEDULE = Schedule(steps=4000, batch=256, rate=2e-3, weight_decay=0.02, checkpoint_every=500)
WEAK = 0.9  # concepts recognized less often are named


@torch.no_grad()
def measure_recognition(model: Classifier, pictures: Tensor, shown: Art) -> dict[str, object]:
    """Return the share recognized of the pictures (2, N, copies, 3, 32, 32) as drawn and as rebuilt, and of each
    concept over both."""
    flat = pictures.flatten(0, 2)
    found = torch.cat([model(as_floats(part))["concept"].argmax(1) for part in flat.split(1024)])
    right = (found.view(pictures.shape[:3]) == shown.concept.to(found.device)[:, None]).float().cpu()
    by_picture = right.mean((0, 2))  # (N,)
    by_concept = {
        name: round(by_picture[shown.concept == index].mean().item(), 3)
        for index, name in enumerate(model.classes.concepts)
        if (shown.concept == index).any()
    }
    return {
        "drawn": round(right[0].mean().item(), 4),
        "rebuilt": round(right[1].mean().item(), 4),
        "weak": [name for name, share in by_concept.items() if share < WEAK],
        "concepts": by_concept,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.llm.classifier", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--art",
        type=Path,
        default=art.WORK / "art-all.safetensors",
        help="pictures; prepared if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--work", type=Path, default=art.WORK, help="folder of checkpoints and packages (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps, help="steps in all (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=SCHEDULE.batch, help="pictures of a step (default: %(default)s)")
    parser.add_argument(
        "--weights", type=Path, default=CLASSIFIER, help="where the result is written (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    concepts = read_all_concepts()
    if not given.art.is_file():
        art.prepare(art.install_packages(given.work / "art"), given.art, concepts)
    pictures, folder = art.load(given.art, concepts), given.work / "checkpoints"
    both = classifier.both_kinds(load_autoencoder(), pictures, device=given.device)
    schedule = dataclasses.replace(SCHEDULE, steps=given.steps, batch=given.batch)
    classifier.train(pictures, both, concepts, folder, name=NAME, schedule=schedule)
    model = classifier.load(concepts, folder, name=NAME)
    classifier.export(model, given.weights)
    print(json.dumps(measure_recognition(model.to(given.device), both, pictures)))  # noqa: T201


if __name__ == "__main__":
    main()
