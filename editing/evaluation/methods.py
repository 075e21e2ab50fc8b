"""Methods under test: each holds a pipeline edited for as long as a `with` block lasts."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from editing.edits import PRESETS, UPDATE_PRESETS, ConceptEdit
from editing.evaluation.baselines import CrossAttention, FineTuning, SingleLayer
from editing.pipelines import EditablePipeline
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import StageOneProgress, optimize_values
from editing.stage_two.update import apply_all_temporarily, compute_update

Progress = Callable[[int, int], None]
"""Called with the work done and all of it, in whatever unit the method works."""

DESTINATION = "destination"
"""The method that the runner draws the destination's prompts for, where others are asked for the source's."""


CONTEXTS = "contexts"
"""Our defaults with each value written in many contexts and what the model knows preserved; not among those measured
unless it is asked for, since it is meant for names that the model does not know."""


class Method(Protocol):
    """A way to edit a pipeline.

    Inside the context the pipeline is edited; after it every weight is what it was, bit for bit, also where an error
    is raised. The work is done on entering. The edits' settings say what suits the pipeline (guidance, solver steps)
    and the seed of each; `seed` is the run's, for whatever else is random. The same call gives the same weights.

    `second_moments` are those of all text encoders of the pipeline. Raises `EditingError` where an edit fails.
    """

    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Unedited:
    """The model as it is."""

    @contextmanager
    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Emcid:
    """Both stages of this package, with defaults but for what is given."""

    stage_one: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `StageOneSettings` that replace those of each edit."""
    stage_two: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `compute_update`."""
    keeps_known: bool = False
    """Whether the names that the model is known to know are preserved: see `keeping`."""

    def keeping(self, names: Sequence[str]) -> "Emcid":
        """The method as it is, or with these names preserved where it preserves what is known."""
        return replace(self, stage_two={**self.stage_two, "preserve": tuple(names)}) if self.keeps_known else self

    @contextmanager
    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> Iterator[None]:
        edits = [replace(edit, settings=replace(edit.settings, **self.stage_one)) for edit in edits]
        values = optimize_values(pipeline, edits, progress=_in_all(edits, progress))
        updates = [
            compute_update(encoder, edits, values, second_moments, **self.stage_two) for encoder in pipeline.encoders
        ]
        with apply_all_temporarily(pipeline.encoders, updates):
            yield


def _stage_two_defaults() -> dict[str, Any]:
    """What stage II does where it is told nothing: said, so that what was measured with other defaults is not taken
    for it."""
    parameters = inspect.signature(compute_update).parameters
    return {name: parameters[name].default for name in ("alpha", "moment_weight", "residual_schedule")}


METHODS: Mapping[str, Method] = {
    "base": Unedited(),
    DESTINATION: Unedited(),
    "emender": Emcid(stage_two=_stage_two_defaults()),
    CONTEXTS: Emcid(stage_two={**_stage_two_defaults(), "contexts": "many"}, keeps_known=True),
    "published": Emcid(PRESETS["published"], UPDATE_PRESETS["published"]),
    "uce": CrossAttention(),
    "refact": SingleLayer(),
    "finetune": FineTuning(),
}
"""By the name that the command line and the tables know it by. `repr` of a method says all that it was set to."""


def _in_all(edits: Sequence[ConceptEdit], progress: Progress | None) -> Callable[[StageOneProgress], None] | None:
    """Stage I's progress as steps of all edits together."""
    if progress is None:
        return None
    done = [0] * len(edits)
    total = sum(edit.settings.optimization_steps for edit in edits)

    def report(step: StageOneProgress) -> None:
        done[step.edit_index] = step.step
        progress(sum(done), total)

    return report
