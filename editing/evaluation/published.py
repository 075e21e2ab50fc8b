"""Judge a set of edits as it was published: which of them took, and what they cost other concepts.

The questions are those of `editing.evaluation.iceb`, made out of the edits themselves: their templates (efficacy),
prompts that are no templates (generalisation), and concepts that no edit names.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import diffusers
import torch
import transformers

from editing import ENGINE_VERSION
from editing.edits import ConceptEdit, DestinationPrompt, Erasure, fill_template
from editing.evaluation.classifiers import Classifier
from editing.evaluation.iceb import Answers, Case, HeldOut, Means, Part, Prompt, Question, Scores, Task
from editing.evaluation.judging import answer
from editing.pipelines import EditablePipeline

SUCCESS_RATIO = 0.5
"""An edit took where it is drawn as its destination at least half as surely as the destination itself, or where an
erased class is seen at most half as surely as before."""

Progress = Callable[[int, int], None]
"""Called with the pictures judged and all that there will be; may raise."""


@dataclass(frozen=True)
class Plan:
    """What is asked about a set of edits."""

    replaced: Task
    """Edits with a destination that the classifier knows, and the held-out concepts."""
    erased: Task
    """Erasures of what it knows, with the source as what is looked for."""
    indices: tuple[tuple[int, ...], tuple[int, ...]]
    """The edits of both tasks, in the caller's numbering."""
    not_evaluated: tuple[tuple[int, str], ...]
    """The other edits, and why nothing can be said of them."""

    @property
    def pictures(self) -> int:
        """How many are drawn for one set of weights."""
        return sum(len(task.questions()) for task in (self.replaced, self.erased))


@dataclass(frozen=True)
class Verdict:
    """One edit. Confidences of the destination, or of what is erased, on prompts that are no templates."""

    index: int
    source: str
    destination: str | None
    before: float
    after: float
    destination_score: float | None
    """The destination's own pictures; None for an erasure."""

    @property
    def succeeded(self) -> bool:
        if self.destination_score is None:
            return self.after <= SUCCESS_RATIO * self.before
        return self.after >= SUCCESS_RATIO * self.destination_score

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["index"]
        return fields | {"succeeded": self.succeeded}


@dataclass(frozen=True)
class Judgement:
    before: Means
    after: Means
    destination: Means
    scores: Scores
    verdicts: tuple[Verdict, ...]
    scales: Mapping[int, Scores]
    """With the first so many of the replaced edits alone, by their number."""

    def as_json(self) -> dict[str, Any]:
        scores = asdict(self.scores) | {"f1": self.scores.f1}
        scales = [{"edits": count, **asdict(found), "f1": found.f1} for count, found in sorted(self.scales.items())]
        confidences = {
            "base": asdict(self.before),
            "edited": asdict(self.after),
            "destination": asdict(self.destination),
        }
        return {"scores": scores, "confidences": confidences, "scales": scales}


def choose_held_out(classifier: Classifier, edits: Sequence[ConceptEdit], *, count: int) -> list[str]:
    """Choose classes that no edit names, at even distances in the classifier's list."""
    named = {edit.source for edit in edits}
    named |= {edit.destination.prompt for edit in edits if isinstance(edit.destination, DestinationPrompt)}
    names = [name for name in classifier.names if name not in named]
    count = min(count, len(names))
    return [names[number * len(names) // count] for number in range(count)]


def describe_environment(pipeline: EditablePipeline) -> dict[str, Any]:
    """Describe what pictures depend on besides the request: sampler, precision, device and versions."""
    return {
        "sampler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.encoder.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "engine": ENGINE_VERSION,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
    }


def plan(
    edits: Sequence[ConceptEdit],
    classifier: Classifier,
    *,
    prompts: Sequence[str],
    held_out: Sequence[str],
    held_out_prompts: Sequence[str],
    seed: int = 0,
    templates: bool = True,
    only: Collection[int] | None = None,
) -> Plan:
    """`prompts` and `held_out_prompts` are templates; each picture has a seed of its own, from `seed` upwards.

    `held_out` are names of the classifier's classes; those that an edit names are left out. Without `templates` the
    edits' own are not drawn. With `only`, no edit is judged but those of these numbers.
    """
    known = set(classifier.names)
    replaced: list[tuple[int, str]] = []
    erased: list[int] = []
    not_evaluated: list[tuple[int, str]] = []
    for index, edit in enumerate(edits):
        if only is not None and index not in only:
            not_evaluated.append((index, "others of this version were chosen"))
            continue
        match edit.destination:
            case DestinationPrompt(prompt) if prompt in known:
                replaced.append((index, prompt))
            case DestinationPrompt(prompt):
                not_evaluated.append((index, f"the classifier knows no class {prompt!r}"))
            case Erasure() if edit.source in known:
                erased.append(index)
            case Erasure():
                not_evaluated.append((index, f"the classifier knows no class {edit.source!r}"))
            case _:
                not_evaluated.append((index, "its destination has no name that a classifier could know"))
    named = {edit.source for edit in edits} | {destination for _, destination in replaced}

    def case(edit: ConceptEdit, destination: str, wanted: str) -> Case:
        original = edit.source if edit.source in known else wanted
        return Case(
            source=edit.source,
            destination=destination,
            source_class=original,
            destination_class=wanted,
            templates=_numbered(edit.templates if templates else (), seed),
            free=_numbered(prompts, seed + len(edit.templates)),
        )

    return Plan(
        replaced=Task(
            "arbitrary",
            tuple(case(edits[index], destination, destination) for index, destination in replaced),
            tuple(
                HeldOut(name, _numbered([fill_template(prompt, name) for prompt in held_out_prompts], seed))
                for name in held_out
                if name in known and name not in named
            ),
        ),
        erased=Task("arbitrary", tuple(case(edits[index], "", edits[index].source) for index in erased), ()),
        indices=(tuple(index for index, _ in replaced), tuple(erased)),
        not_evaluated=tuple(not_evaluated),
    )


def judge(
    pipeline: EditablePipeline,
    classifier: Classifier,
    asked: Plan,
    edited: Callable[[], AbstractContextManager[object]],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    scales: Mapping[int, Callable[[], AbstractContextManager[object]]] | None = None,
    progress: Progress | None = None,
) -> Judgement:
    """`edited` holds the pipeline edited; each of `scales` does with the first so many of the replaced edits alone."""
    scales = scales or {}
    questions, erasures = asked.replaced.questions(), asked.erased.questions()
    smaller = {count: _places_of_first(questions, count) for count in scales}
    of_destinations = sum(question.destination_prompt is not None for question in questions)
    total = 2 * asked.pictures + of_destinations + sum(map(len, smaller.values()))
    done = 0

    def answers(of: Sequence[Question], *, destination_prompts: bool = False) -> Answers:
        nonlocal done

        def report(judged: int) -> None:
            if progress:
                progress(done + judged, total)

        report(0)
        given = answer(
            pipeline,
            classifier,
            of,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            destination_prompts=destination_prompts,
            at_a_time=16,
            progress=report,
        )
        done += of_destinations if destination_prompts else len(of)
        return given

    before, erased_before = answers(questions), answers(erasures)
    best = answers(questions, destination_prompts=True)
    with edited():
        after, erased_after = answers(questions), answers(erasures)
    means = Means.of(questions, before)
    found = {}
    for count, held in scales.items():
        places = smaller[count]
        chosen = [questions[place] for place in places]
        with held():
            then = Means.of(chosen, answers(chosen))
        base = Answers(tuple(before.wanted[i] for i in places), tuple(before.original[i] for i in places))
        found[count] = Scores.of(Means.of(chosen, base), then)
    verdicts = [
        *_verdicts(asked.replaced, asked.indices[0], questions, before, after, best),
        *_verdicts(asked.erased, asked.indices[1], erasures, erased_before, erased_after, None),
    ]
    return Judgement(
        before=means,
        after=Means.of(questions, after),
        destination=Means.of(questions, best),
        scores=Scores.of(means, Means.of(questions, after)),
        verdicts=tuple(sorted(verdicts, key=lambda verdict: verdict.index)),
        scales=found,
    )


def describe_edits(
    asked: Plan,
    judgement: Judgement,
    edits: Sequence[ConceptEdit],
    *,
    ids: Sequence[str],
    residuals: Mapping[str, float],
) -> dict[str, Any]:
    """Describe each edit by its id: its verdict and what the update left undone, or why it was not evaluated."""
    return {
        "edits": [
            {
                "edit": ids[verdict.index],
                **verdict.as_json(),
                "relative_residual": residuals.get(ids[verdict.index]),
            }
            for verdict in judgement.verdicts
        ],
        "not_evaluated": [
            {"edit": ids[index], "source": edits[index].source, "reason": reason}
            for index, reason in asked.not_evaluated
        ],
        "held_out": [concept.name for concept in asked.replaced.held_out],
    }


def _numbered(prompts: Sequence[str], first: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(text, first + number) for number, text in enumerate(prompts))


def _places_of_first(questions: Sequence[Question], count: int) -> list[int]:
    return [place for place, asked in enumerate(questions) if asked.part == "held out" or asked.concept < count]


def _verdicts(
    task: Task,
    indices: Sequence[int],
    questions: Sequence[Question],
    before: Answers,
    after: Answers,
    of_destinations: Answers | None,
) -> list[Verdict]:
    def confidence(answers: Answers, concept: int, part: Part) -> float:
        chosen = [place for place, q in enumerate(questions) if q.concept == concept and q.part == part]
        return mean(float(answers.wanted[place] or 0.0) for place in chosen)

    found = []
    for concept, (index, case) in enumerate(zip(indices, task.cases, strict=True)):
        part: Part = "free" if case.free else "template"
        found.append(
            Verdict(
                index=index,
                source=case.source,
                destination=None if of_destinations is None else case.destination,
                before=confidence(before, concept, part),
                after=confidence(after, concept, part),
                destination_score=None if of_destinations is None else confidence(of_destinations, concept, part),
            )
        )
    return found
