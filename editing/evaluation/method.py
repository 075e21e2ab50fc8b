"""The protocol of the methods that benchmarks compare."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from editing.edits import ConceptEdit
from editing.pipelines import EditablePipeline
from editing.second_moments.moments import SecondMoments

Progress = Callable[[int, int], None]
"""Called with the work done and the total, in the method's own unit."""


class Method(Protocol):
    """A way to edit a pipeline.

    The work is done on entering the context. Inside it the pipeline is edited; on exit every weight is restored bit for
    bit, also after an error. The edits' settings have what suits the pipeline (guidance, inference steps) and the seed
    of each edit; `seed` is the run's, for other random choices. The same call gives the same weights.

    `second_moments` are those of all text encoders of the pipeline. Raises `EditingError` if an edit fails.
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
