"""What is edited and by which prompts it is judged: concepts drawn by a seed, in templates that no edit has."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from demo.concepts import Concept
from demo.llm.captions import HELD_OUT

TaskName = Literal["concepts", "names", "images"]
"""`concepts`: each source becomes another concept. `names`: each source is a name that training never had, and becomes
the concept that it means. `images`: as `concepts`, and pictures show the destination."""
PRESERVED_TEMPLATES = ("a photo of a {}", "{}")
TURNS = 2
"""Prompts of each name, each with its own picture."""
MANY_CONCEPTS = 850
HELD_OUT_CONCEPTS = (60, 100)
"""Concepts that are judged and neither edited nor preserved: of few concepts, of many."""


@dataclass(frozen=True)
class Task:
    """The edits, what is judged besides, and what is preserved. No concept is in two of them."""

    name: TaskName
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...]
    """Other names of sources, which no edit has, and the destination of each."""
    held_out: tuple[str, ...]
    preserved: tuple[str, ...]

    @classmethod
    def draw(
        cls,
        name: TaskName,
        concepts: Sequence[Concept],
        *,
        edits: int,
        seed: int,
        misunderstood: Collection[str] = (),
        held_out: int | None = None,
    ) -> "Task":
        """Draw objects without professions. `misunderstood` are the sources of the task `names`.

        `held_out` concepts are judged, by default as many as `HELD_OUT_CONCEPTS` says.

        Raises ValueError for more edits than there are concepts for.
        """
        chance = random.Random(seed)
        objects = [concept for concept in concepts if concept.skew is None]
        chance.shuffle(objects)
        count = held_out or HELD_OUT_CONCEPTS[len(objects) >= MANY_CONCEPTS]
        if name == "names":
            named = [(concept, alias) for concept in objects for alias in concept.held_out if alias in misunderstood]
            chosen = named[:edits]
            destinations = [concept for concept, _ in chosen]
            sources, aliases = [alias for _, alias in chosen], []
            others = [concept for concept in objects if concept not in destinations]
            found = len(chosen)
        else:
            judged, others = objects[:count], objects[count:]
            pairs = list(zip(others[: 2 * edits : 2], others[1 : 2 * edits : 2], strict=False))
            sources, destinations = [source.name for source, _ in pairs], [goal for _, goal in pairs]
            aliases = [(alias, goal.name) for source, goal in pairs for alias in (*source.aliases, *source.held_out)]
            others = [*judged, *others[2 * edits :]]
            found = len(pairs)
        if found < edits:
            raise ValueError(f"{edits} edits of {name} need more concepts than there are: at most {found}")
        return cls(
            name,
            tuple(sources),
            tuple(goal.name for goal in destinations),
            tuple(aliases),
            held_out=tuple(concept.name for concept in others[:count]),
            preserved=tuple(concept.name for concept in others[count:]),
        )

    @property
    def questions(self) -> dict[str, list[tuple[str, str]]]:
        """The prompts of each question, with the class whose confidence answers it."""
        pairs = list(zip(self.sources, self.destinations, strict=True))
        return {
            "destination": fill_templates(pairs),
            "own_prompts": fill_templates([(goal, goal) for goal in self.destinations]),
            "aliases": fill_templates(self.aliases),
            "held_out": fill_templates([(name, name) for name in self.held_out]),
        }


def fill_templates(named: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return `TURNS` prompts of each name, all of one turn before those of the next, with the class beside it."""
    return [
        (HELD_OUT[(row + turn * 7) % len(HELD_OUT)].format(name), shown)
        for turn in range(TURNS)
        for row, (name, shown) in enumerate(named)
    ]


def fill_names(names: Sequence[str]) -> list[str]:
    """Return the prompts by which names are preserved."""
    return [template.format(name) for name in names for template in PRESERVED_TEMPLATES]
