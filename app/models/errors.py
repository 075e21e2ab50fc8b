"""Problems of models and their statistics."""

from app.problems import Conflict, NotFound


class ModelNotFound(NotFound):
    """No model has the name."""


class ModelAlreadyExists(Conflict):
    """The name is taken by a model whose registration did not fail."""


class ModelNotReady(Conflict):
    """The model is being registered, or its registration failed."""


class ModelNotFailed(Conflict):
    """The model is being registered, or it is ready: only a failed one can be deleted."""


class StatisticsNotFound(NotFound):
    """The model has no statistics of the id."""


class StatisticsInProgress(Conflict):
    """The model's statistics are being estimated; only one estimate of a model runs at a time."""
