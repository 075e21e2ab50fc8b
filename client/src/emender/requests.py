"""What the sync and the async client share: paths, bodies, retries and event streams, without I/O."""

import json
import os
import random
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote
from uuid import UUID

import httpx2
from pydantic import BaseModel, TypeAdapter, ValidationError

from emender.errors import EmenderError
from emender.schemas.common import WorkStatus

Body = BaseModel | Mapping[str, object]
"""A request body: a schema of the API, or a mapping of the same shape."""

Id = UUID | str
Ids = list[UUID] | list[str] | list[UUID | str] | tuple[Id, ...]
"""Not `Sequence[Id]`: a type checker would accept a text, which is a sequence of texts."""
OnStatus = Callable[[WorkStatus], object]
Result = TypeVar("Result")


class HasState(Protocol):
    """A resource with work behind it."""

    state: Any


Resource = TypeVar("Resource", bound=HasState)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_RETRIES = 4
FIRST_DELAY_SECONDS = 0.25
MAX_DELAY_SECONDS = 60.0
"""A longer `Retry-After` is left to the caller."""
EVENT_TIMEOUT_SECONDS = 45.0
"""A stream of events has a line at least every 15 s."""
RETRIED_STATUSES = frozenset({429, 502, 503, 504})


def find_url(url: str | None) -> str:
    """Return the URL given, else EMENDER_URL, else that of a service on this machine."""
    return (url or os.environ.get("EMENDER_URL") or DEFAULT_URL).rstrip("/")


def find_api_key(api_key: str | None) -> str:
    """Return the API key given, else EMENDER_API_KEY. Raises `EmenderError` if there is none."""
    found = api_key or os.environ.get("EMENDER_API_KEY")
    if not found:
        raise EmenderError("No API key.", next_step="Set EMENDER_API_KEY, or pass `api_key`.")
    return found


def url_path(*names: object) -> str:
    """Build a path of the API: `url_path("models", "emoji", "edits")` is `/v1/models/emoji/edits`."""
    return "/v1/" + "/".join(_quote_segment(str(name)) for name in names)


def file_path(folder: str, path: str) -> str:
    """Append the path of a file, which may have folders, to the path of a request."""
    return "/".join([folder, *map(_quote_segment, path.split("/"))])


def drop_none(**fields: object) -> dict[str, Any]:
    """Return the fields that are not None, for a query or a JSON body."""
    return {name: value for name, value in fields.items() if value is not None}


def encode_query(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return the query parameters that are not None, as strings where httpx requires it."""
    return {name: _encode_value(value) for name, value in drop_none(**fields).items()}


def encode_body(body: object) -> bytes:
    """Encode a JSON body. Of a schema, encode the fields that were set."""
    return json.dumps(body, default=_encode_value).encode()


def parse_response(response: httpx2.Response, kind: type[Result]) -> Result:
    """Parse the JSON of a response. Raises `EmenderError` if it is not what this client expects."""
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValidationError as error:
        url = f"{response.request.url.scheme}://{response.request.url.netloc.decode()}"
        raise EmenderError(
            f"{url} sent a response that this client does not understand: {error.errors()[0]['msg']}.",
            next_step="Check that EMENDER_URL is Emender's, and that client and service have the same version.",
        ) from error


def compute_delay(attempt: int) -> float:
    """Return the seconds before the next attempt: twice as many each time, with jitter."""
    return FIRST_DELAY_SECONDS * 2.0 ** (attempt - 1) * random.uniform(0.8, 1.2)


def find_retry_delay(response: httpx2.Response, attempt: int) -> float | None:
    """Return the seconds before the request is sent again. None: it must not be sent again."""
    retry_after = response.headers.get("Retry-After", "")
    if response.status_code not in RETRIED_STATUSES and not (response.status_code == 409 and retry_after):
        return None
    if not retry_after.isdigit():
        return compute_delay(attempt)
    return float(retry_after) if float(retry_after) <= MAX_DELAY_SECONDS else None


def find_sha256(response: httpx2.Response) -> str | None:
    """Return the sha256 of the file that a response has or redirects to, from its ETag."""
    etag: str = response.headers.get("X-Linked-ETag", response.headers.get("ETag", "")).strip('"')
    return etag if len(etag) == 64 else None


class EventParser:
    """Parser of a stream of server-sent events, line by line."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def feed(self, line: str) -> tuple[str, str] | None:
        """Take a line. Return (id, data) at the end of an event; ("", "") is a keep-alive comment."""
        if line:
            name, _, value = line.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        event = self._fields.get("id", ""), self._fields.get("data", "")
        self._fields = {}
        return event


def _quote_segment(name: str) -> str:
    if name in ("", ".", ".."):
        raise EmenderError(f"{name!r} is not a name.", next_step="Give the name of a model, a version or a file.")
    return quote(name, safe="")


def _encode_value(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, UUID | Path):
        return str(value)
    return value
