"""Answer every error with `application/problem+json` (RFC 9457)."""

import errno
import json
from collections.abc import Callable
from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException

from app.problems import (
    ContentTooLarge,
    InsufficientStorage,
    MalformedBody,
    NotFound,
    Problem,
    Unavailable,
    Unprocessable,
    rejected,
)
from app.storage.store import BlobCorrupt, BlobMissing, StoreUnavailable

MEDIA_TYPE = "application/problem+json"
FRAMEWORK_TITLES = {problem.status: problem.title for problem in (NotFound, ContentTooLarge, MalformedBody)}
FRAMEWORK_DETAILS = {
    HTTPStatus.NOT_FOUND: "There is nothing at this path; /docs lists all paths.",
    HTTPStatus.METHOD_NOT_ALLOWED: "The path does not support this method; the Allow header lists those it supports.",
}

log = structlog.get_logger()


def respond(request: Request, problem: Problem) -> Response:
    document = json.dumps(problem.document(instance=request.url.path), ensure_ascii=False)
    # A client's text may have an unpaired surrogate, which UTF-8 cannot encode. JSON escapes can.
    content = document.encode("utf-8", "backslashreplace")
    return Response(content, status_code=problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def to_problem(request: Request, error: Exception) -> Problem:
    """Return the problem that tells the client of an error, and log what only operators may read."""
    match error:
        case Problem():
            return error
        case RequestValidationError():
            return rejected([(each["loc"], each["msg"]) for each in error.errors()])
        case HTTPException():
            status = HTTPStatus(error.status_code)
            detail = str(error.detail)
            if detail == status.phrase:
                detail = FRAMEWORK_DETAILS.get(status, detail + ".")
            problem = Problem(detail, headers=error.headers)
            problem.status, problem.title = status, FRAMEWORK_TITLES.get(status, status.phrase.capitalize())
            return problem
        case DataError():
            log.info("value refused by the database", path=request.url.path, error=type(error).__name__)
            return Unprocessable("A value of the request cannot be stored, such as a NUL character.")
        case OperationalError() | InterfaceError() | NoConnection():
            log.warning("database unavailable", error=type(error).__name__)
            detail = "The database is unavailable; retry. With an Idempotency-Key, a repeated POST is done once."
            return Unavailable(detail, headers={"Retry-After": "2"})
        case BlobCorrupt() | BlobMissing():
            log.error("blob refused", error=type(error).__name__, sha256=str(error))
            return Problem("The stored content is missing or damaged, and is not sent.")
        case StoreUnavailable():
            log.error("store unavailable", error=str(error), cause=str(error.__cause__)[:500])
            return Unavailable("The store is unavailable; retry.", headers={"Retry-After": "5"})
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            log.error("store full", error=str(error))
            return InsufficientStorage("The store is full. Nothing was changed.")
    log.error("unexpected error", path=request.url.path, exc_info=error)
    return Problem("An unexpected error occurred; the service's log has the details.")


def install_handlers(app: FastAPI, *, respond: Callable[[Request, Problem], Response] = respond) -> None:
    """Answer the errors of an application by `respond`. `RequestMiddleware` answers what a mounted one lets through."""

    def handle(request: Request, error: Exception) -> Response:
        return respond(request, to_problem(request, error))

    for kind in (HTTPException, RequestValidationError, Problem, Exception):
        app.add_exception_handler(kind, handle)
