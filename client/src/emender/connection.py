"""How requests are sent: the key, the tries, pages, events, downloads. What they mean is in the groups beside."""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx2
from pydantic import BaseModel, TypeAdapter, ValidationError

from emender.errors import EmenderError, Refused, Unreachable, WaitedInVain, WorkFailed
from emender.schemas.common import ENDED, SUCCEEDED, Page, WorkStatus

Body = BaseModel | Mapping[str, object]
"""What is sent: the schema of the API, or a mapping of the same shape."""


class Work(Protocol):
    """What has work behind it."""

    state: Any


Out = TypeVar("Out")
Worked = TypeVar("Worked", bound=Work)
Seen = Callable[[WorkStatus], object]

RETRIES = 4
PAUSE = 0.25
LONGEST_PAUSE = 60.0
"""A `Retry-After` of more seconds is left to the caller."""
SILENCE = 45.0
"""A stream of events says something each 15 s."""
RETRIED = frozenset({429, 502, 503, 504})


class Connection:
    """The service at a URL, asked with an API key.

    What broke or came too early is sent again, a POST under an Idempotency-Key of its own, so that it is done once
    however often it is sent. The key goes to no other host: redirects are not followed, but for downloads, and there
    without it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        timeout: float = 60.0,
        retries: int = RETRIES,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, kind: type[Out], /, *, wait: int | None = None, **parameters: Any) -> Out:
        """`wait` seconds for the work to end, as the service grants them."""
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        timeout = self.timeout + (wait or 0)
        return self._as(kind, self.ask("GET", path, params=given(**parameters), headers=headers, timeout=timeout))

    def post(self, path: str, kind: type[Out], body: object = None, **options: Any) -> Out:
        if body is not None:
            options |= {"content": encoded(body), "headers": {"Content-Type": "application/json"}}
        return self._as(kind, self.ask("POST", path, **options))

    def patch(self, path: str, kind: type[Out], body: object) -> Out:
        headers = {"Content-Type": "application/json"}
        return self._as(kind, self.ask("PATCH", path, content=encoded(body), headers=headers))

    def delete(self, path: str) -> None:
        """Also where an earlier try of this call deleted it, and its answer was lost."""
        try:
            self.ask("DELETE", path)
        except Refused as refused:
            if refused.status != 404 or refused.attempts == 1:
                raise

    def pages(self, path: str, kind: type[Out], /, **parameters: Any) -> Iterator[Out]:
        """The items of a list, page by page as they are asked for."""
        cursor = None
        while True:
            page = self.get(path, Page[kind], **({"limit": 200} | parameters), cursor=cursor)  # type: ignore[valid-type]
            yield from page.items
            cursor = page.next
            if cursor is None:
                return

    def events(self, path: str, *, deadline: float | None = None) -> Iterator[WorkStatus]:
        """The status of what is at the path, as it is and at each change, until its work has ended.

        A stream that breaks is taken up where it broke (`Last-Event-ID`). Raises `Unreachable`, `Refused`, and
        `WaitedInVain` at the deadline, which is in monotonic seconds.
        """
        known, broken, state = "", 0, "under way"
        while True:
            try:
                for event, data in self._stream_events(f"{path}/events", known=known, deadline=deadline):
                    if event:
                        status = WorkStatus.model_validate_json(data)
                        known, broken, state = event, 0, status.state
                        yield status
                        if state in ENDED:
                            return
                    if deadline is not None and time.monotonic() > deadline:
                        raise WaitedInVain(f"{path} is still {state}.")
                error: Exception = httpx2.RemoteProtocolError("the stream ended early")
            except httpx2.TransportError as cut:
                error = cut
                if deadline is not None and time.monotonic() > deadline:
                    raise WaitedInVain(f"{path} is still {state}.") from cut
            broken += 1
            if broken > self.retries:
                raise self._unreachable(error) from error
            time.sleep(_pause(broken))

    def wait(self, path: str, kind: type[Worked], *, seen: Seen | None, timeout: float | None) -> Worked:
        """What is at the path once its work has ended. Raises `WorkFailed`, and `WaitedInVain` after `timeout` s."""
        for status in self.events(path, deadline=None if timeout is None else time.monotonic() + timeout):
            if seen is not None:
                seen(status)
        found = self.get(path, kind)
        if found.state not in SUCCEEDED:
            raise WorkFailed(found)
        return found

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Send a request until it is answered; the answer is a success. Raises `Refused` and `Unreachable`."""
        headers = {**options.pop("headers", {}), **({"Idempotency-Key": str(uuid4())} if method == "POST" else {})}
        attempt = 0
        while True:
            attempt += 1
            try:
                answer = self._http.request(method, path, headers=headers, **options)
            except httpx2.TransportError as error:
                if attempt > self.retries:
                    raise self._unreachable(error) from error
                time.sleep(_pause(attempt))
                continue
            if answer.is_success:
                return answer
            pause = _asked_pause(answer, attempt)
            if pause is None or attempt > self.retries:
                raise Refused(answer, attempts=attempt)
            time.sleep(pause)

    def lines(self, path: str, *, accept: str, **parameters: object) -> Iterator[str]:
        """A long text, line by line as it comes."""
        try:
            with self._http.stream("GET", path, params=given(**parameters), headers={"Accept": accept}) as answer:
                if not answer.is_success:
                    answer.read()
                    raise Refused(answer)
                for line in answer.iter_lines():
                    yield line + "\n"
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def download(self, path: str, to: Path) -> Path:
        """Put a file at a path of this machine: whole, checked against the sha256 that the service names, or not at
        all. `emender checkpoints pull` is for whole versions: it goes on where a download broke."""
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}.{uuid4().hex}")
        attempt = 0
        while True:
            try:
                self._write(path, partial)
                return partial.replace(to)
            except httpx2.TransportError as error:
                attempt += 1
                if attempt > self.retries:
                    raise self._unreachable(error) from error
                time.sleep(_pause(attempt))
            finally:
                partial.unlink(missing_ok=True)

    def _write(self, path: str, to: Path) -> None:
        with self._opened(path) as (answer, sha256), to.open("wb") as file:
            digest = hashlib.sha256()
            for piece in answer.iter_bytes():
                digest.update(piece)
                file.write(piece)
        if sha256 and digest.hexdigest() != sha256:
            raise EmenderError(f"{path} came damaged.", next_step="Download it again.")

    @contextmanager
    def _opened(self, path: str) -> Iterator[tuple[httpx2.Response, str]]:
        """The answer that has the file, and the sha256 of its ETag; from a bucket, where the service sends there."""
        with self._http.stream("GET", path) as answer:
            sha256 = answer.headers.get("X-Linked-ETag", answer.headers.get("ETag", "")).strip('"')
            sha256 = sha256 if len(sha256) == 64 else ""
            if answer.is_success:
                yield answer, sha256
                return
            answer.read()
            if answer.status_code != 302:
                raise Refused(answer)
        with httpx2.stream("GET", answer.headers["Location"], timeout=self.timeout) as elsewhere:  # without our key
            if not elsewhere.is_success:
                elsewhere.read()
                raise Refused(elsewhere)
            yield elsewhere, sha256

    def _stream_events(self, path: str, *, known: str, deadline: float | None) -> Iterator[tuple[str, str]]:
        """(id, data) of each event; ("", "") where the service says that it is still there."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": known} if known else {})
        left = SILENCE if deadline is None else min(SILENCE, max(0.1, deadline - time.monotonic()))
        timeout = httpx2.Timeout(self.timeout, read=left)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                answer.read()
                pause = _asked_pause(answer, 1)
                if pause is None:
                    raise Refused(answer)
                time.sleep(pause)
                raise httpx2.RemoteProtocolError(f"{answer.status_code}")
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(":")
                if line:
                    fields[name] = value.removeprefix(" ")
                else:
                    yield fields.get("id", ""), fields.get("data", "")
                    fields = {}

    def _as(self, kind: type[Out], answer: httpx2.Response) -> Out:
        try:
            return TypeAdapter(kind).validate_json(answer.content)
        except ValidationError as error:
            raise EmenderError(
                f"{self.url} answers what this client does not know: {error.errors()[0]['msg']}.",
                next_step="Is it Emender, of this client's version?",
            ) from error

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"No Emender answers at {self.url} ({error}).",
            next_step="Start one with `emender serve --embedded`, or set EMENDER_URL.",
        )


def at(*names: object) -> str:
    """The path of what has these names: `at("models", "emoji", "edits")`."""
    return "/v1/" + "/".join(_segment(str(name)) for name in names)


def below(path: str, file: str) -> str:
    """The path of a file, which may lie in folders."""
    return "/".join([path, *map(_segment, file.split("/"))])


def given(**values: object) -> dict[str, Any]:
    """What is not None, as JSON and queries have it."""
    return {name: _plain(value) for name, value in values.items() if value is not None}


def encoded(body: object) -> bytes:
    if isinstance(body, BaseModel):
        return body.model_dump_json(by_alias=True, exclude_unset=True).encode()
    if isinstance(body, Sequence) and not isinstance(body, str):
        return b"[" + b",".join(map(encoded, body)) + b"]"
    return json.dumps(body, default=_plain).encode()


def _segment(name: str) -> str:
    if name in ("", ".", ".."):
        raise EmenderError(f"{name!r} names nothing.", next_step="Give the name of a model, a version or a file.")
    return quote(name, safe="")


def _plain(value: object) -> object:
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def _asked_pause(answer: httpx2.Response, attempt: int) -> float | None:
    """How long to wait before the request is sent again; None: it is not to be."""
    asked = answer.headers.get("Retry-After", "")
    if answer.status_code not in RETRIED and not (answer.status_code == 409 and asked):
        return None
    if not asked.isdigit():
        return _pause(attempt)
    return float(asked) if float(asked) <= LONGEST_PAUSE else None


def _pause(attempt: int) -> float:
    """Seconds: twice as many each time, and of many clients not all at once."""
    return PAUSE * 2.0 ** (attempt - 1) * random.uniform(0.8, 1.2)
