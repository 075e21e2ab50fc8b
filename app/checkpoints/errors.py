"""Why a checkpoint, a file of one or an alias cannot be had."""

from http import HTTPStatus

from app.db.models import Checkpoint, JsonObject
from app.problems import Conflict, Gone, NotFound, PreconditionFailed, Problem


class StatisticsMissing(Conflict):
    title = "Statistics missing"

    def __init__(self, model: str, *, under_way: bool) -> None:
        hint = (
            "they are being estimated: retry once GET /v1/models/{0} shows them"
            if under_way
            else 'make them first with POST /v1/models/{0}/statistics {{"captions": "…"}}'
        )
        super().__init__(f"The model {model!r} has no second moments yet; " + hint.format(model) + ".")


class CheckpointNotFound(NotFound):
    title = "Checkpoint not found"

    def __init__(self, model: str, revision: str) -> None:
        super().__init__(
            f"The model {model!r} has no version or alias {revision!r}; GET /v1/models/{model}/checkpoints lists them."
        )


class CheckpointNotPublished(Conflict):
    title = "Checkpoint not published"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(f"v{checkpoint.number} is {checkpoint.state}; only a published version has files.")


class CheckpointRetracted(Gone):
    title = "Checkpoint retracted"

    def __init__(self, checkpoint: Checkpoint) -> None:
        reason = (checkpoint.problem or {}).get("detail", "")
        super().__init__(f"v{checkpoint.number} was retracted and is no longer served. {reason}".strip())


class FileNotFound(NotFound):
    title = "File not found"


class AliasNotFound(NotFound):
    title = "Alias not found"

    def __init__(self, model: str, name: str) -> None:
        super().__init__(f"The model {model!r} has no alias {name!r}.")


class AliasMoved(PreconditionFailed):
    title = "Alias moved"


class PreconditionRequired(Problem):
    """RFC 6585, section 3: without it, two who move an alias at once would not notice each other."""

    status = HTTPStatus.PRECONDITION_REQUIRED
    title = "Precondition required"


class RangeNotSatisfiable(Problem):
    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
    title = "Range not satisfiable"


class FileUnreadable(Problem):
    """The store has lost a blob, or what it has there is not what was put: refused rather than served."""

    title = "File unreadable"


def problem_of(title: str, detail: str, pointer: str = "") -> JsonObject:
    """The shape in which a row keeps a problem."""
    return {"title": title, "detail": detail, "errors": [{"pointer": pointer, "detail": detail}] if pointer else []}
