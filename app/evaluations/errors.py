"""Problems of evaluations and their files."""

from app.problems import Conflict, NotFound


class EvaluationNotFound(NotFound):
    """The checkpoint has no evaluation of the id."""


class EvaluationFileNotFound(NotFound):
    """The evaluation has no file of the name."""


class EvaluationAlreadyFinished(Conflict):
    """The evaluation is ready or failed, so it cannot be cancelled."""


class ClassifierMissing(Conflict):
    """The model was registered without a classifier, which evaluations need."""
