# Written by client/generate_sync.py from emender/_async. Do not edit.
"""HTTP requests to the service: retries, pages, events and downloads."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO
from uuid import uuid4

import httpx2

from emender.errors import ApiError, ConnectionFailed, EmenderError, WaitTimeout, WorkFailed, build_error
from emender.progress import show_progress
from emender.requests import (
    EVENT_TIMEOUT_SECONDS,
    EventParser,
    OnStatus,
    Resource,
    Result,
    compute_delay,
    encode_body,
    encode_query,
    find_retry_delay,
    find_sha256,
    parse_response,
)
from emender.schemas.common import ENDED, SUCCEEDED, Page, WorkStatus


class Connection:
    """A connection to one service with one API key.

    Requests are retried if the connection breaks or the service asks for it. A POST carries an `Idempotency-Key`, so
    that the service does it once. The API key is sent to no other host: redirects are followed for downloads only,
    without the key.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        timeout: float,
        retries: int,
        transport: httpx2.BaseTransport | None,
    ) -> None:
        self.url = url
        self.timeout = timeout
        self.retries = retries
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Send a request until it succeeds. Raises `ApiError` and `ConnectionFailed`."""
        headers = dict(options.pop("headers", {}))
        if method == "POST":
            headers["Idempotency-Key"] = str(uuid4())
        if "json" in options:
            options["content"] = encode_body(options.pop("json"))
            headers["Content-Type"] = "application/json"
        attempt = 0
        while True:
            attempt += 1
            try:
                response = self._http.request(method, path, headers=headers, **options)
            except httpx2.TransportError as error:
                if attempt > self.retries:
                    raise ConnectionFailed(self.url, error) from error
                time.sleep(compute_delay(attempt))
                continue
            if response.is_success:
                return response
            delay = find_retry_delay(response, attempt)
            if delay is None or attempt > self.retries:
                raise build_error(response, attempts=attempt)
            time.sleep(delay)

    def get(self, path: str, kind: type[Result], /, *, wait: int | None = None, **query: Any) -> Result:
        """Read a resource. `wait`: seconds to wait for the end of its work; the service grants at most 60."""
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        timeout = self.timeout + (wait or 0)
        response = self.request("GET", path, params=encode_query(query), headers=headers, timeout=timeout)
        return parse_response(response, kind)

    def post(self, path: str, kind: type[Result], **options: Any) -> Result:
        return parse_response(self.request("POST", path, **options), kind)

    def patch(self, path: str, kind: type[Result], body: object) -> Result:
        return parse_response(self.request("PATCH", path, json=body), kind)

    def delete(self, path: str) -> None:
        try:
            self.request("DELETE", path)
        except ApiError as error:
            if error.status != 404 or error.attempts == 1:  # else an earlier attempt deleted it
                raise

    def pages(self, path: str, kind: type[Result], /, **query: Any) -> Iterator[Result]:
        """Iterate over a list. Pages are requested when needed."""
        cursor = None
        while True:
            page = self.get(path, Page[kind], **{"limit": 200, **query, "cursor": cursor})  # type: ignore[valid-type]
            for item in page.items:
                yield item
            cursor = page.next
            if cursor is None:
                return

    def lines(self, path: str, *, accept: str, **query: Any) -> Iterator[str]:
        """Iterate over the lines of a long text."""
        try:
            with self._http.stream("GET", path, params=encode_query(query), headers={"Accept": accept}) as response:
                if not response.is_success:
                    response.read()
                    raise build_error(response)
                for line in response.iter_lines():
                    yield line + "\n"
        except httpx2.TransportError as error:
            raise ConnectionFailed(self.url, error) from error

    def events(self, path: str, *, deadline: float | None = None) -> Iterator[WorkStatus]:
        """Iterate over the status of a resource, at first and at each change, until its work has ended.

        If the stream breaks, it is resumed with `Last-Event-ID`. Raises `WaitTimeout` at the deadline (`monotonic`).
        """
        last_event_id, state, failures = "", "in progress", 0
        while True:
            try:
                for event_id, data in self._stream_events(f"{path}/events", last_event_id, deadline):
                    if event_id:
                        status = WorkStatus.model_validate_json(data)
                        last_event_id, state, failures = event_id, status.state, 0
                        yield status
                        if state in ENDED:
                            return
                    if deadline is not None and monotonic() > deadline:
                        raise WaitTimeout(f"{path} is still {state}.")
                error: Exception = httpx2.RemoteProtocolError("the stream ended early")
            except httpx2.TransportError as broken:
                error = broken
                if deadline is not None and monotonic() > deadline:
                    raise WaitTimeout(f"{path} is still {state}.") from broken
            failures += 1
            if failures > self.retries:
                raise ConnectionFailed(self.url, error) from error
            time.sleep(compute_delay(failures))

    def wait(
        self,
        path: str,
        kind: type[Resource],
        *,
        label: str,
        on_status: OnStatus | None,
        progress: bool,
        timeout: float | None,
    ) -> Resource:
        """Return a resource once its work has succeeded. Raises `WorkFailed` and `WaitTimeout`."""
        deadline = None if timeout is None else monotonic() + timeout
        with show_progress(label) if progress else nullcontext() as update_bar:
            for status in self.events(path, deadline=deadline):
                for notify in filter(None, (update_bar, on_status)):
                    notify(status)
        resource = self.get(path, kind)
        if resource.state not in SUCCEEDED:
            raise WorkFailed(resource)
        return resource

    def read_file(self, path: str) -> bytes:
        """Download a file into memory and verify its sha256."""
        content = BytesIO()
        self._fetch(path, content)
        return content.getvalue()

    def download(self, path: str, to: Path) -> Path:
        """Download a file and verify its sha256. The file appears whole or not at all."""
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}.{uuid4().hex}")
        try:
            with partial.open("wb") as file:
                self._fetch(path, file)
            return partial.replace(to)
        finally:
            partial.unlink(missing_ok=True)

    def _fetch(self, path: str, file: BinaryIO) -> None:
        failures = 0
        while True:
            try:
                for chunk in self._stream_file(path):
                    file.write(chunk)
                return
            except httpx2.TransportError as error:
                failures += 1
                if failures > self.retries:
                    raise ConnectionFailed(self.url, error) from error
                file.seek(0)
                file.truncate()
                time.sleep(compute_delay(failures))

    def _stream_file(self, path: str) -> Iterator[bytes]:
        """Iterate over the content of a file, from the service or from the bucket that it redirects to."""
        digest = hashlib.sha256()
        with self._http.stream("GET", path) as response:
            sha256 = find_sha256(response)
            if response.is_success:
                for chunk in response.iter_bytes():
                    digest.update(chunk)
                    yield chunk
            else:
                response.read()
        if response.status_code == 302:
            # A client of its own, since this one would send the API key.
            with httpx2.Client(timeout=self.timeout) as http:
                with http.stream("GET", response.headers["Location"]) as redirected:
                    if not redirected.is_success:
                        redirected.read()
                        raise build_error(redirected)
                    for chunk in redirected.iter_bytes():
                        digest.update(chunk)
                        yield chunk
        elif not response.is_success:
            raise build_error(response)
        if sha256 and digest.hexdigest() != sha256:
            raise EmenderError(f"The download of {path} is damaged.", next_step="Download it again.")

    def _stream_events(self, path: str, last_event_id: str, deadline: float | None) -> Iterator[tuple[str, str]]:
        """Iterate over (id, data) of the events of one response."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        read_timeout = EVENT_TIMEOUT_SECONDS
        if deadline is not None:
            read_timeout = min(read_timeout, max(0.1, deadline - monotonic()))
        timeout = httpx2.Timeout(self.timeout, read=read_timeout)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                delay = find_retry_delay(response, 1)
                if delay is None:
                    raise build_error(response)
                time.sleep(delay)
                raise httpx2.RemoteProtocolError(f"status {response.status_code}")
            parser = EventParser()
            for line in response.iter_lines():
                event = parser.feed(line)
                if event is not None:
                    yield event
