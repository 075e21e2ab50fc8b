"""The protocol of ICEB, the ImageNet Concept Editing Benchmark (EMCID, section 4): tasks, and the metrics of Table 3.

p(a, b) is the mean confidence of class a on pictures drawn for b, one picture a prompt at its own seed. A task is given
by `editing.evaluation.iceb_files` for ICEB itself, or by any `Suite`, such as the emoji edition of `demo.benchmark`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Literal, Protocol

from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings, fill_template

TaskName = Literal["arbitrary", "rectification"]
Part = Literal["template", "free", "alias", "held out"]


@dataclass(frozen=True)
class Prompt:
    """What is drawn, and the seed of its noise. `{}` stands where a concept goes; of a held-out one nothing is open."""

    text: str
    seed: int


@dataclass(frozen=True)
class Case:
    """One edit of a task, and how it is judged. Classes are the classifier's names."""

    source: str
    destination: str
    source_class: str
    destination_class: str
    """The source's own in rectification, where the source is a name of that class which the model misunderstands."""
    templates: tuple[Prompt, ...]
    """The edit's templates: efficacy."""
    free: tuple[Prompt, ...]
    """Other prompts: generalisation."""
    aliases: tuple[str, ...] = ()
    """Other names of the source, which the edit does not name."""
    alias_prompts: tuple[Prompt, ...] = ()
    seed: int = 0
    """Of stage I."""


@dataclass(frozen=True)
class HeldOut:
    """A concept that no edit names, to be drawn as before."""

    name: str
    """Of the classifier's class."""
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Question:
    """One picture to draw, and the classes whose confidences are read off it."""

    part: Part
    concept: int
    """Which one of its part: the edit, the alias or the held-out concept."""
    prompt: str
    destination_prompt: str | None
    """The prompt with the destination in it; None for held-out concepts, which the edits should not change."""
    seed: int
    wanted: str
    original: str | None
    """The class of the source; None where it is what is wanted."""


@dataclass(frozen=True)
class Task:
    """Edits to make at once, and the questions that judge them."""

    name: TaskName
    cases: tuple[Case, ...]
    held_out: tuple[HeldOut, ...]
    settings: StageOneSettings = field(default_factory=StageOneSettings)
    """Of stage I, as far as they say what suits the model that draws: guidance and solver steps."""

    def edits(self) -> list[ConceptEdit]:
        return [
            ConceptEdit(
                case.source,
                DestinationPrompt(case.destination),
                tuple(prompt.text for prompt in case.templates),
                replace(self.settings, seed=case.seed),
            )
            for case in self.cases
        ]

    def questions(self) -> tuple[Question, ...]:
        """In an order of their own: by part, then by concept."""
        return tuple(self._questions())

    def classes(self) -> frozenset[str]:
        """All that the classifier must know."""
        asked = self.questions()
        return frozenset(q.wanted for q in asked) | {q.original for q in asked if q.original is not None}

    def _questions(self) -> Iterator[Question]:
        for index, case in enumerate(self.cases):
            yield from _asked("template", index, case, case.source, case.templates)
        for index, case in enumerate(self.cases):
            yield from _asked("free", index, case, case.source, case.free)
        aliases = [(case, alias) for case in self.cases for alias in case.aliases]
        for index, (case, alias) in enumerate(aliases):
            yield from _asked("alias", index, case, alias, case.alias_prompts)
        for index, concept in enumerate(self.held_out):
            for prompt in concept.prompts:
                yield Question("held out", index, prompt.text, None, prompt.seed, concept.name, None)


def _asked(part: Part, index: int, case: Case, subject: str, prompts: Sequence[Prompt]) -> Iterator[Question]:
    original = None if case.source_class == case.destination_class else case.source_class
    for prompt in prompts:
        yield Question(
            part=part,
            concept=index,
            prompt=fill_template(prompt.text, subject),
            destination_prompt=fill_template(prompt.text, case.destination),
            seed=prompt.seed,
            wanted=case.destination_class,
            original=original,
        )


class Suite(Protocol):
    """A benchmark's tasks."""

    def task(self, name: TaskName, *, edits: int, seed: int) -> Task:
        """The same for the same arguments. Raises `TaskUnreadable` for more edits or another seed than there are."""
        ...


@dataclass(frozen=True)
class Answers:
    """The confidences read off the pictures of a task, in the order of its questions; None where none was drawn."""

    wanted: tuple[float | None, ...]
    original: tuple[float | None, ...]


@dataclass(frozen=True)
class Means:
    """p over a task: the mean over concepts of the mean over the prompts of each. None where nothing was asked."""

    source_template: float | None
    """The source's class on pictures of the source, by the edits' templates"""
    source: float | None
    """The same by free prompts"""
    destination_template: float | None
    """The destination's class on pictures of the source, by the edits' templates"""
    destination: float | None
    """The same by free prompts"""
    alias: float | None
    """The destination's class on pictures of the source's aliases"""
    held_out: float | None
    """The class of held-out concepts on their own pictures"""

    @classmethod
    def of(cls, questions: Sequence[Question], answers: Answers) -> "Means":
        def over(part: Part, confidences: Iterable[float | None]) -> float | None:
            by_concept: dict[int, list[float]] = {}
            for question, confidence in zip(questions, confidences, strict=True):
                if question.part == part and confidence is not None:
                    by_concept.setdefault(question.concept, []).append(confidence)
            return mean(map(mean, by_concept.values())) if by_concept else None

        return cls(
            source_template=over("template", answers.original),
            source=over("free", answers.original),
            destination_template=over("template", answers.wanted),
            destination=over("free", answers.wanted),
            alias=over("alias", answers.wanted),
            held_out=over("held out", answers.wanted),
        )


@dataclass(frozen=True)
class Scores:
    """Table 3: what the edits change, on free prompts where no more is said. None where a task does not define it."""

    sf_template: float | None
    sf: float | None
    """Source Forget"""
    s2d_template: float | None
    """Source2Dest, efficacy"""
    s2d: float | None
    """Source2Dest, generalisation"""
    al2d: float | None
    """Alias2Dest"""
    hd: float | None
    """Holdout Delta, 0 at best"""

    @property
    def f1(self) -> float | None:
        """The mean of generalisation S2D and HD, as section 5.5 defines it; no harmonic mean."""
        return None if self.s2d is None or self.hd is None else (self.s2d + self.hd) / 2

    @classmethod
    def of(cls, before: Means, after: Means) -> "Scores":
        """Held-out concepts that were not drawn again are as before."""
        kept = before.held_out if after.held_out is None else after.held_out
        return cls(
            sf_template=_difference(before.source_template, after.source_template),
            sf=_difference(before.source, after.source),
            s2d_template=_difference(after.destination_template, before.destination_template),
            s2d=_difference(after.destination, before.destination),
            al2d=_difference(after.alias, before.alias),
            hd=_difference(kept, before.held_out),
        )


METRICS = ("sf_template", "sf", "s2d_template", "s2d", "al2d", "hd", "f1")


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
