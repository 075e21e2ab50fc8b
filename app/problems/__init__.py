"""Errors that a client sees, and the handlers that turn every error into `application/problem+json` (RFC 9457)."""

import errno
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.storage.store import BlobCorrupt, BlobMissing, StoreUnavailable
from emender.schemas.common import PROBLEM_TYPES, FieldError, ProblemDocument

MEDIA_TYPE = "application/problem+json"


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
    """A body that is well-formed and wrong; `errors` say where."""

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


class Unavailable(Problem):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    title = "Service unavailable"


class InsufficientStorage(Problem):
    status = HTTPStatus.INSUFFICIENT_STORAGE


class FileUnreadable(Problem):
    """A file is missing in the store, or its bytes do not have its sha256. It is never sent."""


def documented(*problems: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses=`: the problems that it answers with, by status."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for problem in problems:
        known = by_status.setdefault(int(problem.status), {"model": ProblemDocument, "description": ""})
        known["description"] = f"{known['description']}, {problem.title}".removeprefix(", ")
    return by_status


def respond(request: Request, problem: Problem) -> Response:
    document = json.dumps(problem.document(instance=request.url.path), ensure_ascii=False)
    # What a client sent may hold half a surrogate pair, which is no UTF-8: its escape is JSON.
    content = document.encode("utf-8", "backslashreplace")
    return Response(content, status_code=problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def pointer(location: Sequence[str | int]) -> str:
    """FastAPI's error location as a JSON Pointer: `("body", "templates", 1)` → `/templates/1`."""
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in location]
    if parts and parts[0] == "body":
        return "".join("/" + part for part in parts[1:])
    return parts[-1] if parts else ""


def rejected(found: Iterable[tuple[Sequence[str | int], str]]) -> Unprocessable:
    """What pydantic found, each a location as FastAPI writes it and a message."""
    errors = [FieldError(pointer=pointer(at), detail=said.removeprefix("Value error, ")) for at, said in found]
    what = "; ".join(f"{error.pointer or 'body'}: {error.detail}" for error in errors[:3])
    return Unprocessable(f"The request was rejected: {what}.", errors=errors)


FRAMEWORK_TITLES = {problem.status: problem.title for problem in (NotFound, ContentTooLarge, MalformedBody)}
FRAMEWORK_DETAILS = {
    HTTPStatus.NOT_FOUND: "There is nothing at this path; /docs lists what there is.",
    HTTPStatus.METHOD_NOT_ALLOWED: "This path does not take this method; the Allow header lists those that it takes.",
}


class Unexpected:
    """Middleware: answers what no handler knows, inside the other middleware, so that this answer too has its headers.

    An error after the answer began goes on to the server, which cuts the connection.
    """

    def __init__(self, app: ASGIApp, *, respond: Callable[[Request, Exception], Response]) -> None:
        self.app = app
        self.respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await self.respond(Request(scope), error)(scope, receive, send)


def install(app: FastAPI, *, respond: Callable[[Request, Problem], Response] = respond) -> None:
    """Register the handlers, also for what the framework itself raises; before any other middleware is added.

    `respond` makes the answer that shows a problem.
    """

    def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return respond(request, error)

    def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        for e in error.errors():
            if e["type"] == "json_invalid":
                return respond(request, MalformedBody(f"The body is not JSON: {e['ctx']['error']}."))
        return respond(request, rejected([(e["loc"], e["msg"]) for e in error.errors()]))

    def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        detail = str(error.detail)
        if detail == status.phrase:
            detail = FRAMEWORK_DETAILS.get(status, detail + ".")
        wrapped = Problem(detail, headers=error.headers)
        wrapped.status = status
        wrapped.title = FRAMEWORK_TITLES.get(status, status.phrase.capitalize())
        return respond(request, wrapped)

    def unstorable(request: Request, error: Exception) -> Response:
        structlog.get_logger().info("value refused by the database", path=request.url.path, error=type(error).__name__)
        return respond(request, Unprocessable("A value of the request cannot be stored, such as a NUL character."))

    def damaged(request: Request, error: Exception) -> Response:
        structlog.get_logger().error("blob refused", error=type(error).__name__, sha256=str(error))
        return respond(request, Problem("The stored content is missing or damaged, and is not served."))

    def storage(request: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        if isinstance(error, StoreUnavailable):
            structlog.get_logger().error("store unavailable", error=str(error), cause=str(error.__cause__)[:500])
            return respond(request, Unavailable("The store does not answer; retry.", headers={"Retry-After": "5"}))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return unexpected(request, error)
        structlog.get_logger().error("store full", error=str(error))
        return respond(request, InsufficientStorage("The store is full. Nothing was changed."))

    def database(request: Request, error: Exception) -> Response:
        structlog.get_logger().warning("database unavailable", error=type(error).__name__)
        unavailable = Unavailable(
            "The database does not answer; retry. With an Idempotency-Key, a POST is done once, however often sent.",
            headers={"Retry-After": "2"},
        )
        return respond(request, unavailable)

    def unexpected(request: Request, error: Exception) -> Response:
        structlog.get_logger().error("unexpected error", path=request.url.path, exc_info=error)
        return respond(request, Problem("Something went wrong on our side; the log has the details."))

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(OSError, storage)
    app.add_exception_handler(BlobCorrupt, damaged)
    app.add_exception_handler(BlobMissing, damaged)
    app.add_exception_handler(DataError, unstorable)
    app.add_exception_handler(OperationalError, database)
    app.add_exception_handler(InterfaceError, database)
    app.add_exception_handler(NoConnection, database)
    app.add_middleware(Unexpected, respond=unexpected)
