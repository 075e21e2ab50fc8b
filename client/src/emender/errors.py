"""What can go wrong between a client and the service. Each error is readable as it stands, and says what to do."""

from http import HTTPStatus
from typing import Any

import httpx2
from pydantic import ValidationError

from emender.schemas.common import FieldError, ProblemDocument

NEXT_STEPS = {
    401: "Set EMENDER_API_KEY to a key that is valid. An admin makes one: `emender keys create NAME --scope read`.",
    403: "Use a key with that scope. An admin makes one: `emender keys create NAME --scope SCOPE`.",
    412: "Read it again and decide anew: somebody else moved it.",
    428: "Read it first, and say what you expect it to be.",
    429: "Ask less often, or let an operator raise EMENDER_RATE_LIMIT.",
    500: "The service's log tells more, under the request's id.",
    502: "Try again. If it stays so, look at the proxy before the service.",
    503: "Try again in a moment. If it stays so, look at the service's log.",
    507: "Make room: `emender store collect` deletes what nothing refers to.",
}


class EmenderError(Exception):
    """What went wrong, and in `next_step` what to do."""

    def __init__(self, what: str, *, next_step: str | None = None) -> None:
        super().__init__("\n".join(filter(None, (what, next_step))))
        self.next_step = next_step


class Unreachable(EmenderError):
    """Nobody answered, or the connection broke at every try."""


class WaitedInVain(EmenderError):
    """The work went on for longer than the caller wished to wait. It still goes on."""


class WorkFailed(EmenderError):
    """Work that was accepted has failed, or was cancelled; `resource` is what it was for."""

    def __init__(self, resource: Any) -> None:
        self.resource = resource
        names = (getattr(resource, field, None) for field in ("version", "name", "source", "captions_name", "id"))
        problem = resource.model_dump()["problem"] or {}
        name = next(filter(None, names))
        super().__init__(f"{name} is {resource.state}: {problem.get('detail', 'no reason was given')}")


class Refused(EmenderError):
    """The service answered with a problem (RFC 9457)."""

    status: int
    type: str
    title: str
    detail: str
    instance: str
    """The path of the request."""
    errors: list[FieldError]
    """What is wrong with the body, each with a JSON pointer into it."""
    request_id: str | None
    """By which the service's log and audit log name the request."""
    attempts: int
    """How often it was sent, the last time included."""

    def __init__(self, answer: httpx2.Response, *, attempts: int = 1) -> None:
        self.status = answer.status_code
        self.request_id = answer.headers.get("X-Request-ID")
        self.attempts = attempts
        problem = _problem_of(answer)
        self.type, self.title, self.detail = problem.type, problem.title, problem.detail
        self.instance, self.errors = problem.instance, problem.errors
        lines = [f"{self.title} ({self.status}): {self.detail}"]
        for error in self.errors:
            if error.pointer or error.detail not in lines[0]:
                lines.append(f"  {error.pointer or 'body'}: {error.detail}")
        if self.status >= 500 and self.request_id:
            lines.append(f"  request {self.request_id}")
        super().__init__("\n".join(lines), next_step=_next_step(answer))


def _problem_of(answer: httpx2.Response) -> ProblemDocument:
    """The body, or the like of what is no problem document: the answer of a proxy."""
    try:
        return ProblemDocument.model_validate_json(answer.content)
    except ValidationError:
        known = {status.value: status.phrase for status in HTTPStatus}
        return ProblemDocument(
            type="about:blank",
            title=known.get(answer.status_code, "Unknown answer"),
            status=answer.status_code,
            detail=answer.text[:200],
            instance=answer.request.url.path,
        )


def _next_step(answer: httpx2.Response) -> str | None:
    if answer.has_redirect_location:
        return f"It sends to {answer.headers['Location']}: set EMENDER_URL to what answers there, if it is yours."
    return NEXT_STEPS.get(answer.status_code)
