"""The errors that clients see, as exceptions. `app.api.problems` makes HTTP responses of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from emender.schemas.common import PROBLEM_TYPES, FieldError, ProblemDocument


class Problem(Exception):
    """An error with a status and a title. `detail` says what is wrong, where, and what to do.

    The title of a subclass is its name in words, unless it sets one: `ModelNotFound` is "Model not found".
    """

    status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR
    title: str = "Internal error"

    def __init_subclass__(cls) -> None:
        if "title" not in cls.__dict__:
            cls.title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).capitalize()

    def __init__(
        self, detail: str, *, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def document(self, *, instance: str) -> dict[str, Any]:
        document = ProblemDocument(
            type=PROBLEM_TYPES + self.title.lower().replace(" ", "-"),
            title=self.title,
            status=self.status,
            detail=self.detail,
            instance=instance,
            errors=self.errors,
        )
        return document.model_dump(exclude=None if self.errors else {"errors"})


class NotFound(Problem):
    status = HTTPStatus.NOT_FOUND


class Conflict(Problem):
    status = HTTPStatus.CONFLICT


class Gone(Problem):
    status = HTTPStatus.GONE


class MalformedBody(Problem):
    status = HTTPStatus.BAD_REQUEST


class Unprocessable(Problem):
    """A well-formed but invalid request; `errors` say where."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    title = "Invalid request"

    @classmethod
    def at(cls, pointer: str, detail: str) -> "Unprocessable":
        return cls(detail, errors=[FieldError(pointer=pointer, detail=detail)])

    @classmethod
    def raise_for(cls, errors: Sequence[tuple[str, str]]) -> None:
        """Raise a problem with at most 100 of the errors, each a pointer and a detail. Does nothing without errors."""
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            found = [FieldError(pointer=pointer, detail=detail) for pointer, detail in errors[:100]]
            raise cls(errors[0][1] + more, errors=found)


class PreconditionFailed(Problem):
    status = HTTPStatus.PRECONDITION_FAILED


class ContentTooLarge(Problem):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class RequestTimeout(Problem):
    status = HTTPStatus.REQUEST_TIMEOUT


class UnsupportedMedia(Problem):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    title = "Unsupported media type"


class Unauthorized(Problem):
    status = HTTPStatus.UNAUTHORIZED


class Forbidden(Problem):
    status = HTTPStatus.FORBIDDEN


class TooManyRequests(Problem):
    status = HTTPStatus.TOO_MANY_REQUESTS


class Unavailable(Problem):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    title = "Service unavailable"


class InsufficientStorage(Problem):
    status = HTTPStatus.INSUFFICIENT_STORAGE


class FileUnreadable(Problem):
    """A file is missing in the store, or its bytes do not have its sha256. It is never sent."""


def documented(*problems: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that raises these problems."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for problem in problems:
        known = by_status.setdefault(int(problem.status), {"model": ProblemDocument, "description": ""})
        known["description"] = f"{known['description']}, {problem.title}".removeprefix(", ")
    return by_status


def pointer(location: Sequence[str | int]) -> str:
    """Convert FastAPI's error location to a JSON Pointer: `("body", "templates", 1)` → `/templates/1`."""
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in location]
    if parts and parts[0] == "body":
        return "".join("/" + part for part in parts[1:])
    return parts[-1] if parts else ""


def rejected(found: Iterable[tuple[Sequence[str | int], str]]) -> Unprocessable:
    """Return the problem with pydantic's errors, each a location as FastAPI writes it and a message."""
    errors = [FieldError(pointer=pointer(loc), detail=text.removeprefix("Value error, ")) for loc, text in found]
    what = "; ".join(f"{error.pointer or 'body'}: {error.detail}" for error in errors[:3])
    return Unprocessable(f"The request was rejected: {what}.", errors=errors)
