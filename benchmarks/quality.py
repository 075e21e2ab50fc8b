"""How well a set of edits does on the emoji model: the metrics of the paper's Table 3, judged by its classifier.

p(a, b) is the classifier's confidence of concept b on pictures of prompts that name a. Every prompt is drawn once, at
a seed that depends on its place alone, so that all settings of one task are judged on the same noise.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import mean

from demo.classify import Classifier, classify
from demo.concepts import Concept
from demo.edits import FREE_PROMPTS
from demo.emoji import GUIDANCE, STEPS
from editing.edits import DEFAULT_TEMPLATES
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline
from editing.stage_two.update import Update, apply_temporarily

HELD_OUT_PROMPTS = ("an image of a {}", *FREE_PROMPTS)
PICTURES = 200  # of a mean, about: of many concepts, each is asked for by a few of the prompts in turn


@dataclass(frozen=True)
class Task:
    """Arbitrary concept editing: each source shall be drawn as its destination, the held-out concepts as before."""

    pairs: tuple[tuple[str, str], ...]
    aliases: tuple[tuple[str, str], ...]
    """Trained other names of the sources, with the destinations."""
    held_out: tuple[str, ...]


def arbitrary_editing(concepts: Sequence[Concept], *, edits: int, seed: int, held_out: int = 60) -> Task:
    """Return a task of distinct objects. Raises ValueError where there are too few."""
    objects = [concept for concept in concepts if concept.skew is None]
    if 2 * edits + held_out > len(objects):
        raise ValueError(f"{edits} edits and {held_out} held-out concepts want more than {len(objects)} objects")
    random.Random(seed).shuffle(objects)
    sources, destinations = objects[:edits], objects[edits : 2 * edits]
    both = list(zip(sources, destinations, strict=True))
    return Task(
        pairs=tuple((source.name, destination.name) for source, destination in both),
        aliases=tuple((alias, destination.name) for source, destination in both for alias in source.aliases),
        held_out=tuple(concept.name for concept in objects[2 * edits : 2 * edits + held_out]),
    )


@dataclass(frozen=True)
class Means:
    """Means of p over a task's prompts."""

    source: float
    """p(s, s), template prompts"""
    template: float
    """p(s, d), template prompts"""
    free: float
    """p(s, d), prompts that are no template of the edits"""
    alias: float
    """p(alias of s, d), free prompts"""
    held_out: float
    """p(h, h)"""


@dataclass(frozen=True)
class Scores:
    """Differences that the edits make: Table 3. `f1` is the mean of generalisation S2D and HD, as in the paper."""

    sf: float
    s2d_template: float
    s2d_free: float
    al2d: float
    hd: float

    @property
    def f1(self) -> float:
        return (self.s2d_free + self.hd) / 2


@dataclass
class Examiner:
    """Draws a task's prompts with a pipeline and reads them."""

    pipeline: EditablePipeline
    classifier: Classifier
    num_inference_steps: int = STEPS
    """of the solver"""

    def means(self, task: Task, update: Update | None = None) -> Means:
        """With the update in place, or of the base."""
        if update is not None:
            with apply_temporarily(self.pipeline.encoder, update):
                return self.means(task)
        sources = [(source, source) for source, _ in task.pairs]
        held_out = [(name, name) for name in task.held_out]
        return Means(
            source=self._mean(sources, DEFAULT_TEMPLATES),
            template=self._mean(task.pairs, DEFAULT_TEMPLATES),
            free=self._mean(task.pairs, FREE_PROMPTS),
            alias=self._mean(task.aliases, FREE_PROMPTS[:2]),
            held_out=self._mean(held_out, HELD_OUT_PROMPTS[:2]),
        )

    def _mean(self, named: Sequence[tuple[str, str]], prompts: Sequence[str]) -> float:
        """Mean over prompts that name the first of each pair, of the confidence of the second: all the prompts, or of
        many pairs as many for each as give about `PICTURES`, in turn."""
        if not named:
            return 0.0
        few = min(len(prompts), ceil(PICTURES / len(named)))
        requested = [
            (prompts[(index * few + number) % len(prompts)].format(name), wanted)
            for index, (name, wanted) in enumerate(named)
            for number in range(few)
        ]
        pictures = draw_pictures(
            self.pipeline,
            [prompt for prompt, _ in requested],
            seeds=range(len(requested)),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=GUIDANCE,
        )
        read = classify(pictures, self.classifier)
        places = [read.classes.concepts.index(wanted) for _, wanted in requested]
        return mean(float(read.concept[row, place]) for row, place in enumerate(places))


def compare(before: Means, after: Means) -> Scores:
    return Scores(
        sf=before.source - after.source,
        s2d_template=after.template - before.template,
        s2d_free=after.free - before.free,
        al2d=after.alias - before.alias,
        hd=after.held_out - before.held_out,
    )
