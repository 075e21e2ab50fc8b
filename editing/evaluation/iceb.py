"""The protocol of ICEB, the ImageNet Concept Editing Benchmark (EMCID, section 4): tasks, and the metrics of Table 3.

p(a, b) is the mean confidence of class a on pictures drawn for b, one picture per prompt with its own seed. Tasks come
from `editing.evaluation.iceb_files` for ICEB itself, or from any `Suite`, such as the emoji edition of
`demo.benchmark`.
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
    """A prompt with its seed. `{}` is replaced by a concept; prompts of held-out concepts have none."""

    text: str
    seed: int


@dataclass(frozen=True)
class Case:
    """One edit of a task, and the prompts that judge it. Classes are the classifier's names."""

    source: str
    destination: str
    source_class: str
    destination_class: str
    """In rectification that of the source, which is a name of the class that the model misunderstands."""
    templates: tuple[Prompt, ...]
    """The edit's templates: efficacy."""
    free: tuple[Prompt, ...]
    """Other prompts: generalization."""
    aliases: tuple[str, ...] = ()
    """Other names of the source, unknown to the edit."""
    alias_prompts: tuple[Prompt, ...] = ()
    seed: int = 0
    """Of stage I."""


@dataclass(frozen=True)
class HeldOut:
    """A concept that no edit names. It should be drawn as before."""

    name: str
    """The classifier's name of its class."""
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Question:
    """One picture to draw, and the classes whose confidences it gives."""

    part: Part
    concept: int
    """Index of the edit, the alias or the held-out concept within its part."""
    prompt: str
    destination_prompt: str | None
    """The prompt with the destination instead; None for held-out concepts."""
    seed: int
    wanted: str
    """The class that the picture should show."""
    original: str | None
    """The class of the source; None if it is the wanted one."""


@dataclass(frozen=True)
class Task:
    """Edits that are applied together, and the questions that judge them."""

    name: TaskName
    cases: tuple[Case, ...]
    held_out: tuple[HeldOut, ...]
    settings: StageOneSettings = field(default_factory=StageOneSettings)
    """Settings of stage I that suit the model: guidance scale and inference steps."""

    def build_edits(self) -> list[ConceptEdit]:
        return [
            ConceptEdit(
                case.source,
                DestinationPrompt(case.destination),
                tuple(prompt.text for prompt in case.templates),
                replace(self.settings, seed=case.seed),
            )
            for case in self.cases
        ]

    def build_questions(self) -> tuple[Question, ...]:
        """Return the questions in a fixed order: by part, then by concept."""
        return tuple(self._iterate_questions())

    def list_classes(self) -> frozenset[str]:
        """Return the classes that the classifier must know."""
        questions = self.build_questions()
        return frozenset(q.wanted for q in questions) | {q.original for q in questions if q.original is not None}

    def _iterate_questions(self) -> Iterator[Question]:
        for index, case in enumerate(self.cases):
            yield from _build_part("template", index, case, case.source, case.templates)
        for index, case in enumerate(self.cases):
            yield from _build_part("free", index, case, case.source, case.free)
        aliases = [(case, alias) for case in self.cases for alias in case.aliases]
        for index, (case, alias) in enumerate(aliases):
            yield from _build_part("alias", index, case, alias, case.alias_prompts)
        for index, concept in enumerate(self.held_out):
            for prompt in concept.prompts:
                yield Question("held out", index, prompt.text, None, prompt.seed, concept.name, None)


def _build_part(part: Part, index: int, case: Case, subject: str, prompts: Sequence[Prompt]) -> Iterator[Question]:
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

    def build_task(self, name: TaskName, *, edits: int, seed: int) -> Task:
        """Return the same task for the same arguments. Raises `TaskUnreadable` if there is no such task."""
        ...


@dataclass(frozen=True)
class Confidences:
    """The confidences for a task's questions, in their order; None where no picture was drawn."""

    wanted: tuple[float | None, ...]
    original: tuple[float | None, ...]


@dataclass(frozen=True)
class Means:
    """p of a task: the mean over concepts of the mean over each concept's prompts. None without questions."""

    source_template: float | None
    """The source's class on pictures of the source, with the edits' templates"""
    source: float | None
    """The same with free prompts"""
    destination_template: float | None
    """The destination's class on pictures of the source, with the edits' templates"""
    destination: float | None
    """The same with free prompts"""
    alias: float | None
    """The destination's class on pictures of the source's aliases"""
    held_out: float | None
    """The class of held-out concepts on their own pictures"""

    @classmethod
    def average(cls, questions: Sequence[Question], confidences: Confidences) -> "Means":
        def average_part(part: Part, confidences: Iterable[float | None]) -> float | None:
            by_concept: dict[int, list[float]] = {}
            for question, confidence in zip(questions, confidences, strict=True):
                if question.part == part and confidence is not None:
                    by_concept.setdefault(question.concept, []).append(confidence)
            return mean(map(mean, by_concept.values())) if by_concept else None

        return cls(
            source_template=average_part("template", confidences.original),
            source=average_part("free", confidences.original),
            destination_template=average_part("template", confidences.wanted),
            destination=average_part("free", confidences.wanted),
            alias=average_part("alias", confidences.wanted),
            held_out=average_part("held out", confidences.wanted),
        )


@dataclass(frozen=True)
class Scores:
    """Table 3: the changes by the edits, on free prompts unless stated. None if the task does not define it."""

    sf_template: float | None
    sf: float | None
    """Source Forget"""
    s2d_template: float | None
    """Source2Dest, efficacy"""
    s2d: float | None
    """Source2Dest, generalization"""
    al2d: float | None
    """Alias2Dest"""
    hd: float | None
    """Holdout Delta, 0 at best"""

    @property
    def f1(self) -> float | None:
        """The arithmetic mean of generalization S2D and HD, as section 5.5 defines it."""
        return None if self.s2d is None or self.hd is None else (self.s2d + self.hd) / 2

    @classmethod
    def compare(cls, before: Means, after: Means) -> "Scores":
        """Compare the means before and after. Held-out concepts that were not drawn again count as unchanged."""
        held_out = before.held_out if after.held_out is None else after.held_out
        return cls(
            sf_template=_subtract(before.source_template, after.source_template),
            sf=_subtract(before.source, after.source),
            s2d_template=_subtract(after.destination_template, before.destination_template),
            s2d=_subtract(after.destination, before.destination),
            al2d=_subtract(after.alias, before.alias),
            hd=_subtract(held_out, before.held_out),
        )


METRICS = ("sf_template", "sf", "s2d_template", "s2d", "al2d", "hd", "f1")


def _subtract(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
