"""Problems of edits."""

from app.problems import Conflict, NotFound


class EditNotFound(NotFound):
    """No edit has the id."""


class EditNotReady(Conflict):
    """The edit has no value yet."""


class EditAlreadyFinished(Conflict):
    """The edit is ready or failed, so it cannot be cancelled."""


class EditNotRetryable(Conflict):
    """The edit is not failed or cancelled, so it cannot be retried."""
