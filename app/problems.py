"""Errors that a client sees, and the handlers that turn every error into `application/problem+json` (RFC 9457)."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
TYPES = "https://emender.dev/problems/"


class FieldError(BaseModel):
    """One rejected part of a body."""

    pointer: str = Field(description="JSON Pointer (RFC 6901) into the body, or the name of the parameter")
    detail: str


class ProblemDocument(BaseModel):
    """The shape of every error answer (RFC 9457)."""

    type: str = Field(examples=[TYPES + "edit-not-found"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="the path of the request")
    errors: list[FieldError] = Field(default=[], description="for a rejected body: what, where")


class Problem(Exception):
    """An error with a status and a name. Subclasses name themselves; `detail` says what happened and what to do."""

    status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR
    title: str = "Internal error"

    def __init__(
        self, detail: str, *, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def document(self, *, instance: str) -> dict[str, Any]:
        document = ProblemDocument(
            type=TYPES + self.title.lower().replace(" ", "-"),
            title=self.title,
            status=self.status,
            detail=self.detail,
            instance=instance,
            errors=self.errors,
        )
        return document.model_dump(exclude=None if self.errors else {"errors"})


class NotFound(Problem):
    status = HTTPStatus.NOT_FOUND
    title = "Not found"


class Conflict(Problem):
    status = HTTPStatus.CONFLICT
    title = "Conflict"


class Gone(Problem):
    status = HTTPStatus.GONE
    title = "Gone"


class Unprocessable(Problem):
    """A body that is well-formed and wrong; `errors` say where."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    title = "Invalid request"

    @classmethod
    def at(cls, pointer: str, detail: str) -> "Unprocessable":
        return cls(detail, errors=[FieldError(pointer=pointer, detail=detail)])


class PreconditionFailed(Problem):
    status = HTTPStatus.PRECONDITION_FAILED
    title = "Precondition failed"


class ContentTooLarge(Problem):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    title = "Content too large"


class UnsupportedMedia(Problem):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    title = "Unsupported media type"


class Unauthorized(Problem):
    status = HTTPStatus.UNAUTHORIZED
    title = "Unauthorized"


class Forbidden(Problem):
    status = HTTPStatus.FORBIDDEN
    title = "Forbidden"


class Unavailable(Problem):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    title = "Service unavailable"


def respond(request: Request, problem: Problem) -> JSONResponse:
    return JSONResponse(
        problem.document(instance=request.url.path),
        status_code=problem.status,
        headers=problem.headers,
        media_type=MEDIA_TYPE,
    )


def pointer(location: Sequence[str | int]) -> str:
    """FastAPI's error location as a JSON Pointer: `("body", "templates", 1)` → `/templates/1`."""
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in location]
    if parts and parts[0] == "body":
        return "".join("/" + part for part in parts[1:])
    return parts[-1] if parts else ""


def install(app: FastAPI) -> None:
    """Register the handlers, also for what the framework itself raises."""

    def problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return respond(request, error)

    def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        errors = [FieldError(pointer=pointer(e["loc"]), detail=e["msg"]) for e in error.errors()]
        if any(e["type"] == "json_invalid" for e in error.errors()):
            malformed = Problem(f"The body is not JSON: {errors[0].detail}.", errors=errors)
            malformed.status, malformed.title = HTTPStatus.BAD_REQUEST, "Malformed body"
            return respond(request, malformed)
        what = "; ".join(f"{e.pointer or 'body'}: {e.detail}" for e in errors[:3])
        return respond(request, Unprocessable(f"The request was rejected: {what}.", errors=errors))

    def framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        wrapped = Problem(str(error.detail), headers=error.headers)
        wrapped.status = HTTPStatus(error.status_code)
        wrapped.title = wrapped.status.phrase
        return respond(request, wrapped)

    def database(request: Request, error: Exception) -> JSONResponse:
        structlog.get_logger().warning("database unavailable", error=type(error).__name__)
        unavailable = Unavailable(
            "The database does not answer. Nothing was changed; retry.", headers={"Retry-After": "2"}
        )
        return respond(request, unavailable)

    def unexpected(request: Request, error: Exception) -> JSONResponse:
        structlog.get_logger().exception("unexpected error", path=request.url.path, error=type(error).__name__)
        return respond(request, Problem("Something went wrong on our side; the log has the details."))

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(OperationalError, database)
    app.add_exception_handler(InterfaceError, database)
    app.add_exception_handler(Exception, unexpected)
