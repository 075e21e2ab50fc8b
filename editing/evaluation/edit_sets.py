"""Evaluate a set of edits as it was published: which edits succeeded, and what they cost other concepts.

The questions are those of `editing.evaluation.iceb`, built from the edits themselves: their templates (efficacy), other
prompts (generalization), and concepts that no edit names.
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
from editing.evaluation.confidences import measure_confidences
from editing.evaluation.iceb import Case, Confidences, HeldOut, Means, Part, Prompt, Question, Scores, Task
from editing.pipelines import EditablePipeline

SUCCESS_RATIO = 0.5
"""An edit has succeeded if its source shows the destination with at least half of the destination's own confidence, or
an erased class with at most half of its confidence before."""

_CHUNK = 16  # pictures between two calls of `progress`

Progress = Callable[[int, int], None]
"""Called with the number of pictures so far and their total. May raise."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The questions about a set of edits."""

    replaced: Task
    """The edits with a destination that the classifier knows, and the held-out concepts."""
    erased: Task
    """The erasures of classes that it knows. The wanted class is the source."""
    indices: tuple[tuple[int, ...], tuple[int, ...]]
    """The edits of both tasks, by their index in the call."""
    not_evaluated: tuple[tuple[int, str], ...]
    """The other edits, and why they cannot be evaluated."""

    @property
    def pictures(self) -> int:
        """Number of pictures for one set of weights."""
        return sum(len(task.build_questions()) for task in (self.replaced, self.erased))


@dataclass(frozen=True)
class EditScore:
    """One edit. Scores are confidences of the destination, or of the erased class, on free prompts if there are any."""

    index: int
    source: str
    destination: str | None
    """None for an erasure."""
    before: float
    after: float
    destination_score: float | None
    """The confidence on the destination's own pictures; None for an erasure."""

    @property
    def succeeded(self) -> bool:
        if self.destination_score is None:
            return self.after <= SUCCESS_RATIO * self.before
        return self.after >= SUCCESS_RATIO * self.destination_score

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["index"]
        return fields | {"succeeded": self.succeeded}


@dataclass(frozen=True)
class EditSetEvaluation:
    before: Means
    after: Means
    destination: Means
    """The unedited model with the destinations' own prompts."""
    scores: Scores
    edits: tuple[EditScore, ...]
    scales: Mapping[int, Scores]
    """Scores with only the first edits, by their number."""

    def to_json(self) -> dict[str, Any]:
        scores = asdict(self.scores) | {"f1": self.scores.f1}
        scales = [{"edits": count, **asdict(own), "f1": own.f1} for count, own in sorted(self.scales.items())]
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
        "sampler": type(pipeline.generator.scheduler).__name__,
        "dtype": str(pipeline.encoder.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "engine": ENGINE_VERSION,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
    }


def describe_edits(
    plan: EvaluationPlan,
    evaluation: EditSetEvaluation,
    edits: Sequence[ConceptEdit],
    *,
    ids: Sequence[str],
    residuals: Mapping[str, float],
) -> dict[str, Any]:
    """Describe each edit by its id: its score and relative residual, or why it was not evaluated."""
    return {
        "edits": [
            {"edit": ids[edit.index], **edit.to_json(), "relative_residual": residuals.get(ids[edit.index])}
            for edit in evaluation.edits
        ],
        "not_evaluated": [
            {"edit": ids[index], "source": edits[index].source, "reason": reason}
            for index, reason in plan.not_evaluated
        ],
        "held_out": [concept.name for concept in plan.replaced.held_out],
    }


def plan_evaluation(
    edits: Sequence[ConceptEdit],
    classifier: Classifier,
    *,
    prompts: Sequence[str],
    held_out: Sequence[str],
    held_out_prompts: Sequence[str],
    seed: int = 0,
    templates: bool = True,
    only: Collection[int] | None = None,
) -> EvaluationPlan:
    """Plan the evaluation of a set of edits.

    `prompts` and `held_out_prompts` are templates. Each picture has its own seed, from `seed` upwards. `held_out` are
    names of the classifier's classes, without those that an edit names. Without `templates` the edits' own templates
    are not drawn. `only` selects edits by index.
    """
    known = set(classifier.names)
    replaced: list[tuple[int, str]] = []
    erased: list[int] = []
    not_evaluated: list[tuple[int, str]] = []
    for index, edit in enumerate(edits):
        if only is not None and index not in only:
            not_evaluated.append((index, "a check draws only some edits of a version"))
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
                not_evaluated.append((index, "the destination has no name that a classifier could know"))
    named = {edit.source for edit in edits} | {destination for _, destination in replaced}

    def build_case(edit: ConceptEdit, destination: str, wanted: str) -> Case:
        original = edit.source if edit.source in known else wanted
        return Case(
            source=edit.source,
            destination=destination,
            source_class=original,
            destination_class=wanted,
            templates=_add_seeds(edit.templates if templates else (), seed),
            free=_add_seeds(prompts, seed + len(edit.templates)),
        )

    return EvaluationPlan(
        replaced=Task(
            "arbitrary",
            tuple(build_case(edits[index], destination, destination) for index, destination in replaced),
            tuple(
                HeldOut(name, _add_seeds([fill_template(prompt, name) for prompt in held_out_prompts], seed))
                for name in held_out
                if name in known and name not in named
            ),
        ),
        erased=Task("arbitrary", tuple(build_case(edits[index], "", edits[index].source) for index in erased), ()),
        indices=(tuple(index for index, _ in replaced), tuple(erased)),
        not_evaluated=tuple(not_evaluated),
    )


def evaluate_edits(
    pipeline: EditablePipeline,
    classifier: Classifier,
    plan: EvaluationPlan,
    edited: Callable[[], AbstractContextManager[object]],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    scales: Mapping[int, Callable[[], AbstractContextManager[object]]] | None = None,
    progress: Progress | None = None,
) -> EditSetEvaluation:
    """Draw the pictures of a plan before and after, and score the edits.

    `edited` edits the pipeline inside its context, each of `scales` with only the first of the replaced edits.
    """
    scales = scales or {}
    questions, erasures = plan.replaced.build_questions(), plan.erased.build_questions()
    smaller = {count: _select_first(questions, count) for count in scales}
    of_destinations = sum(question.destination_prompt is not None for question in questions)
    total = 2 * plan.pictures + of_destinations + sum(map(len, smaller.values()))
    done = 0

    def measure(chosen: Sequence[Question], *, destination_prompts: bool = False) -> Confidences:
        nonlocal done

        def report(pictures: int) -> None:
            if progress:
                progress(done + pictures, total)

        report(0)
        confidences = measure_confidences(
            pipeline,
            classifier,
            chosen,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            destination_prompts=destination_prompts,
            chunk=_CHUNK,
            progress=report,
        )
        done += of_destinations if destination_prompts else len(chosen)
        return confidences

    before, erased_before = measure(questions), measure(erasures)
    at_destination = measure(questions, destination_prompts=True)
    with edited():
        after, erased_after = measure(questions), measure(erasures)
    means = Means.average(questions, before)
    scores_by_count = {}
    for count, edited_by_some in scales.items():
        indices = smaller[count]
        chosen = [questions[index] for index in indices]
        with edited_by_some():
            then = Means.average(chosen, measure(chosen))
        base = Confidences(tuple(before.wanted[i] for i in indices), tuple(before.original[i] for i in indices))
        scores_by_count[count] = Scores.compare(Means.average(chosen, base), then)
    edit_scores = [
        *_score_edits(plan.replaced, plan.indices[0], questions, before, after, at_destination),
        *_score_edits(plan.erased, plan.indices[1], erasures, erased_before, erased_after, None),
    ]
    return EditSetEvaluation(
        before=means,
        after=Means.average(questions, after),
        destination=Means.average(questions, at_destination),
        scores=Scores.compare(means, Means.average(questions, after)),
        edits=tuple(sorted(edit_scores, key=lambda score: score.index)),
        scales=scores_by_count,
    )


def _add_seeds(prompts: Sequence[str], first: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(text, first + number) for number, text in enumerate(prompts))


def _select_first(questions: Sequence[Question], count: int) -> list[int]:
    """Return the indices of the questions about the first edits and the held-out concepts."""
    return [i for i, question in enumerate(questions) if question.part == "held out" or question.concept < count]


def _score_edits(
    task: Task,
    indices: Sequence[int],
    questions: Sequence[Question],
    before: Confidences,
    after: Confidences,
    at_destination: Confidences | None,
) -> list[EditScore]:
    def average(confidences: Confidences, concept: int, part: Part) -> float:
        chosen = [i for i, question in enumerate(questions) if question.concept == concept and question.part == part]
        return mean(float(confidences.wanted[i] or 0.0) for i in chosen)

    scores = []
    for concept, (index, case) in enumerate(zip(indices, task.cases, strict=True)):
        part: Part = "free" if case.free else "template"
        scores.append(
            EditScore(
                index=index,
                source=case.source,
                destination=None if at_destination is None else case.destination,
                before=average(before, concept, part),
                after=average(after, concept, part),
                destination_score=None if at_destination is None else average(at_destination, concept, part),
            )
        )
    return scores
