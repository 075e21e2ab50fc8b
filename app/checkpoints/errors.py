"""Problems of checkpoints, their files and aliases."""

from http import HTTPStatus

from app.problems import Conflict, Gone, NotFound, PreconditionFailed, Problem


class StatisticsMissing(Conflict):
    """The model has no second moments, which edits of its text encoders need."""


class CheckpointNotFound(NotFound):
    """The model has no version, alias or commit of the name."""


class CheckpointNotPublished(Conflict):
    """The checkpoint is being built, or its build failed."""


class CheckpointRetracted(Gone):
    """An administrator retracted the checkpoint; its files are not served."""


class FileNotFound(NotFound):
    """The checkpoint has no file of the path, or no checkpoint has a file of the sha256."""


class AliasNotFound(NotFound):
    """The model has no alias of the name."""


class AliasMoved(PreconditionFailed):
    """The alias is not in the state that `If-Match` or `If-None-Match` expects."""


class PreconditionRequired(Problem):
    """`If-Match` is missing. Without it, two concurrent moves of an alias would overwrite each other (RFC 6585)."""

    status = HTTPStatus.PRECONDITION_REQUIRED
