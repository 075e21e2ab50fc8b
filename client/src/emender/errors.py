"""Errors of the client. Each message says what is wrong and what to do."""

from http import HTTPStatus
from typing import Any

import httpx2
from pydantic import ValidationError

from emender.schemas.common import FieldError, ProblemDocument

NEXT_STEPS = {
    401: "Set EMENDER_API_KEY to a valid key. An admin creates one: `emender keys create NAME --scope read`.",
    403: "Use a key with that scope. An admin creates one: `emender keys create NAME --scope SCOPE`.",
    412: "Someone else changed it. Read it again, then decide.",
    428: "Read it first, and pass what you read as `expected`.",
    429: "Send fewer requests, or ask an operator to raise EMENDER_RATE_LIMIT.",
    500: "The service's log has more, under the request id.",
    502: "Try again. If it persists, check the proxy before the service.",
    503: "Try again in a moment. If it persists, read the service's log.",
    507: "Free disk space: `emender storage collect` deletes unused blobs.",
}


class EmenderError(Exception):
    """Base of all errors of the client. `next_step` says what to do."""

    def __init__(self, detail: str, *, next_step: str | None = None) -> None:
        super().__init__("\n".join(filter(None, (detail, next_step))))
        self.next_step = next_step


class CaptionsUnreadable(EmenderError):
    """A file has no captions, or a line of it is not a caption."""


class ConnectionFailed(EmenderError):
    """The service did not respond, or the connection broke at every attempt."""

    def __init__(self, url: str, error: Exception) -> None:
        next_step = "Start the service with `emender serve --embedded`, or set EMENDER_URL."
        super().__init__(f"No response from {url} ({error}).", next_step=next_step)


class WaitTimeout(EmenderError):
    """The work took longer than `timeout`. It continues."""


class WorkFailed(EmenderError):
    """Accepted work failed or was cancelled. `resource` is the edit, checkpoint, … in its final state."""

    def __init__(self, resource: Any) -> None:
        self.resource = resource
        names = (getattr(resource, field, None) for field in ("version", "name", "source", "captions_name", "id"))
        problem = resource.model_dump()["problem"] or {}
        super().__init__(f"{next(filter(None, names))} {resource.state}: {problem.get('detail', 'no reason given')}")


class ApiError(EmenderError):
    """The service returned an error (RFC 9457 problem document). Subclasses name the common ones."""

    status: int
    type: str
    title: str
    detail: str
    instance: str
    """The path of the request."""
    errors: list[FieldError]
    """The rejected fields of the body, each with a JSON pointer."""
    request_id: str | None
    """The id of the request in the service's log and audit log."""
    attempts: int
    """How many times the request was sent."""

    def __init__(self, response: httpx2.Response, *, attempts: int = 1) -> None:
        self.status = response.status_code
        self.request_id = response.headers.get("X-Request-ID")
        self.attempts = attempts
        problem = _parse_problem(response)
        self.type, self.title, self.detail = problem.type, problem.title, problem.detail
        self.instance, self.errors = problem.instance, problem.errors
        lines = [f"{self.title} ({self.status}): {self.detail}"]
        for error in self.errors:
            if error.pointer or error.detail not in lines[0]:
                lines.append(f"  {error.pointer or 'body'}: {error.detail}")
        if self.status >= 500 and self.request_id:
            lines.append(f"  request {self.request_id}")
        super().__init__("\n".join(lines), next_step=_find_next_step(response))


class Unauthorized(ApiError):
    """401: the API key is missing, unknown, expired or revoked."""


class Forbidden(ApiError):
    """403: the API key lacks a scope."""


class NotFound(ApiError):
    """404 or 410: the resource does not exist, or was retracted."""


class Conflict(ApiError):
    """409, 412 or 428: the resource is in another state than the request requires."""


class ValidationFailed(ApiError):
    """400 or 422: the request is malformed, or fields of its body are invalid. See `errors`."""


class RateLimited(ApiError):
    """429: too many requests."""


ERRORS: dict[int, type[ApiError]] = {
    400: ValidationFailed,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    412: Conflict,
    422: ValidationFailed,
    428: Conflict,
    429: RateLimited,
}


def build_error(response: httpx2.Response, *, attempts: int = 1) -> ApiError:
    """Build the error of a response whose body was read."""
    return ERRORS.get(response.status_code, ApiError)(response, attempts=attempts)


def _parse_problem(response: httpx2.Response) -> ProblemDocument:
    """Parse the body. A proxy's body is no problem document: use its status and its first characters."""
    try:
        return ProblemDocument.model_validate_json(response.content)
    except ValidationError:
        phrases = {status.value: status.phrase for status in HTTPStatus}
        return ProblemDocument(
            type="about:blank",
            title=phrases.get(response.status_code, "Unknown status"),
            status=response.status_code,
            detail=response.text[:200],
            instance=response.request.url.path,
        )


def _find_next_step(response: httpx2.Response) -> str | None:
    if response.has_redirect_location:
        return f"The service redirects to {response.headers['Location']}. If you trust it, set EMENDER_URL to it."
    return NEXT_STEPS.get(response.status_code)
