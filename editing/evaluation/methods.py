"""The methods under test by name: our own, and those of `editing.evaluation.baselines`."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from editing.edits import PRESETS, UPDATE_PRESETS, ConceptEdit
from editing.evaluation.baselines import CrossAttention, FineTuning, SingleLayer
from editing.evaluation.method import Method, Progress
from editing.pipelines import EditablePipeline
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import StageOneProgress, optimize_values
from editing.stage_two.update import apply_all_temporarily, compute_update

DESTINATION = "destination"
"""The unedited model, drawn with the destination's prompts: what a perfect edit would reach."""

CONTEXTS = "contexts"
"""Our defaults, with each value written in many contexts and the known names preserved. It is for names that the model
does not know, and runs only if it is named."""


@dataclass(frozen=True)
class Unedited:
    """The model without edits."""

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
    """Both stages of this package."""

    stage_one: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `StageOneSettings` that replace those of each edit."""
    stage_two: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `compute_update`."""
    preserves_known: bool = False
    """Whether the names that the model knows are preserved: see `with_known`."""

    def with_known(self, names: Sequence[str]) -> "Emcid":
        """Return the method with these names preserved, if it preserves known names."""
        return replace(self, stage_two={**self.stage_two, "preserve": tuple(names)}) if self.preserves_known else self

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
        values = optimize_values(pipeline, edits, progress=_sum_steps(edits, progress))
        updates = [
            compute_update(encoder, edits, values, second_moments, **self.stage_two) for encoder in pipeline.encoders
        ]
        with apply_all_temporarily(pipeline.encoders, updates):
            yield


def _stage_two_defaults() -> dict[str, Any]:
    """Return the defaults of stage II. A changed default then changes the `repr` that stored results depend on."""
    parameters = inspect.signature(compute_update).parameters
    return {name: parameters[name].default for name in ("alpha", "moment_weight", "residual_schedule")}


METHODS: Mapping[str, Method] = {
    "base": Unedited(),
    DESTINATION: Unedited(),
    "emender": Emcid(stage_two=_stage_two_defaults()),
    CONTEXTS: Emcid(stage_two={**_stage_two_defaults(), "contexts": "many"}, preserves_known=True),
    "published": Emcid(PRESETS["published"], UPDATE_PRESETS["published"]),
    "uce": CrossAttention(),
    "refact": SingleLayer(),
    "finetune": FineTuning(),
}
"""By the name on the command line and in tables. The `repr` of a method has all of its settings."""


def _sum_steps(edits: Sequence[ConceptEdit], progress: Progress | None) -> Callable[[StageOneProgress], None] | None:
    """Report stage I's progress as the steps of all edits together."""
    if progress is None:
        return None
    done = [0] * len(edits)
    total = sum(edit.settings.optimization_steps for edit in edits)

    def report(step: StageOneProgress) -> None:
        done[step.edit_index] = step.step
        progress(sum(done), total)

    return report
