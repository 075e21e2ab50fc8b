"""Choose the edits of the emoji edition: `python -m demo.benchmark.build` writes its three lists, always the same.

Arbitrary editing, as in ICEB: half of the objects are sources; each becomes one of the five concepts of the other half
whose captions the text encoder finds nearest; that half is held out. Rectification: every alias that was held out of
the training and that the model misunderstands becomes the name that it knows; held out are concepts without such ones.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from demo.benchmark import FOLDER, SEEDS, file_of
from demo.concepts import WEIGHTS, Concept, read_concepts
from editing.edits import DEFAULT_TEMPLATES, fill_template
from editing.encoders.base import TextEncoder
from editing.pipelines import load_pipeline

FREE_PROMPTS = (
    "look at this cute {}",
    "a simple drawing of one small {}",
    "a beautiful photo of the {}",
    "a nice close-up of one {}",
    "a {} in the middle of a white background",
    "my favourite picture of a {}",
    "a cute small {} on a white background",
    "look at this stunning image of a {}",
    "one beautiful {} in the middle of the picture",
    "here is a sticker of the {}",
    "what a lovely {}",
    "the {} of my dreams",
)
"""Put as no template of an edit is and no caption that the model was trained on, in words that it knows or does not
mind. By each, objects are drawn with a mean confidence of 0.998 or more (one in sixteen of them, one seed)."""

UNDERSTOOD = frozenset(
    {
        "sweetcorn", "cheeseburger", "spacecraft", "joypad", "knapsack", "medic", "educator", "kitchen worker",
        "chemist",
    }
)  # fmt: skip
"""Aliases held out of the training that the model draws all the same, with 0.97 or more: nothing is wrong with them."""

NEAREST = 5
PROMPTS_FREE = 5  # free prompts of a source
PROMPTS_HELD_OUT = 2
HELD_OUT = 100  # of rectification
CAPTION = "an image of a {}"


def choice(concepts: Sequence[Concept], distances: Tensor, *, seed: int) -> dict[str, Any]:
    """Both tasks of a seed; `distances` (concepts, concepts) between the concepts' captions."""
    chance = random.Random(seed)
    return {
        "templates": list(DEFAULT_TEMPLATES),
        "arbitrary": _arbitrary(chance, concepts, distances),
        "rectification": _rectification(chance, concepts),
    }


def _arbitrary(chance: random.Random, concepts: Sequence[Concept], distances: Tensor) -> dict[str, Any]:
    objects = [index for index, concept in enumerate(concepts) if concept.skew is None]
    chance.shuffle(objects)
    sources, others = objects[: len(objects) // 2], objects[len(objects) // 2 :]
    edits = []
    for source in sources:
        nearest = sorted(others, key=lambda other: (float(distances[source, other]), other))[:NEAREST]
        concept, destination = concepts[source], concepts[chance.choice(nearest)]
        edits.append(_edit(chance, concept, concept.name, destination.name, concept.aliases))
    return {"edits": edits, "held_out": [_held_out(chance, concepts[other]) for other in others]}


def _rectification(chance: random.Random, concepts: Sequence[Concept]) -> dict[str, Any]:
    misunderstood = [(alias, concept) for concept in concepts for alias in concept.held_out if alias not in UNDERSTOOD]
    chance.shuffle(misunderstood)
    others = [concept for concept in concepts if concept.skew is None and not concept.held_out]
    return {
        "edits": [_edit(chance, concept, alias, concept.name, ()) for alias, concept in misunderstood],
        "held_out": [_held_out(chance, concept) for concept in chance.sample(others, HELD_OUT)],
    }


def _edit(
    chance: random.Random, concept: Concept, source: str, destination: str, aliases: Sequence[str]
) -> dict[str, Any]:
    return {
        "source": source,
        "class": concept.name,
        "destination": destination,
        "aliases": list(aliases),
        "prompts": chance.sample(FREE_PROMPTS, PROMPTS_FREE),
        "seeds": _seeds(chance, PROMPTS_FREE),
        "seed": _seeds(chance, 1)[0],
    }


def _held_out(chance: random.Random, concept: Concept) -> dict[str, Any]:
    prompts = [fill_template(prompt, concept.name) for prompt in chance.sample(FREE_PROMPTS, PROMPTS_HELD_OUT)]
    return {"name": concept.name, "prompts": prompts, "seeds": _seeds(chance, PROMPTS_HELD_OUT)}


def _seeds(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(100_000) for _ in range(count)]


@torch.no_grad()
def text_distances(encoder: TextEncoder, concepts: Sequence[Concept]) -> Tensor:
    """One minus the cosine of what the encoder says of the captions of two concepts, (concepts, concepts)."""
    captions = [encoder.tokenizer.encode(fill_template(CAPTION, concept.name)).ids for concept in concepts]
    pooled = encoder.encode(captions).pooled
    assert pooled is not None
    pooled = F.normalize(pooled.double(), dim=1)  # (concepts, d)
    return 1 - pooled @ pooled.T


def as_text(choice: dict[str, Any]) -> str:
    """JSON with a line for each edit and each held-out concept."""
    parts = [f'"templates": {json.dumps(choice["templates"])}']
    for task in ("arbitrary", "rectification"):
        lists = [
            f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in choice[task][name]) + "\n]"
            for name in ("edits", "held_out")
        ]
        parts.append(f'"{task}": {{\n' + ",\n".join(lists) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def build() -> list[str]:
    """Return the text of each seed's file."""
    concepts = read_concepts()
    distances = text_distances(load_pipeline(WEIGHTS / "pipeline").encoder, concepts)
    return [as_text(choice(concepts, distances, seed=seed)) for seed in range(SEEDS)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.benchmark.build", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the lists are written")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, text in enumerate(build()):
        file_of(seed, folder).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
