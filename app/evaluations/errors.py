"""Why an evaluation, or a file of one, cannot be had."""

from uuid import UUID

from app.problems import Conflict, NotFound


class EvaluationNotFound(NotFound):
    title = "Evaluation not found"

    def __init__(self, version: str, evaluation_id: UUID) -> None:
        super().__init__(f"{version} has no evaluation {evaluation_id}; GET …/{version}/evaluations lists them.")


class ClassifierMissing(Conflict):
    title = "Classifier missing"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"Nothing judges the pictures of {model!r}: register it with a `classifier`, or ask for previews, which "
            "people judge."
        )


class EvaluationFileNotFound(NotFound):
    title = "Evaluation file not found"

    def __init__(self, name: str, known: str) -> None:
        super().__init__(f"The evaluation has no file {name!r}; it has {known or 'none yet'}.")


class EvaluationHasEnded(Conflict):
    title = "Evaluation has ended"

    def __init__(self, evaluation_id: UUID, state: str) -> None:
        super().__init__(f"The evaluation {evaluation_id} is {state}; only one that is queued or running is cancelled.")
