"""Send a file of the store: strong ETag, conditional requests, ranges, or a redirect to the bucket that has it."""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from app.observability.metrics import PULLED_BYTES, PULLS
from app.problems import FileUnreadable, Problem, documented
from app.storage.store import CHUNK, BlobCorrupt, BlobMissing, Store
from editing.files import File

Endpoint = TypeVar("Endpoint", bound=Callable[..., Response])

MEDIA_TYPES = {
    ".png": "image/png",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
BINARY = "application/octet-stream"
RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))")


class RangeNotSatisfiable(Problem):
    """The file has no byte of the requested range."""

    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


def file_route(
    router: APIRouter, path: str, *problems: type[Problem], media_types: tuple[str, ...] = (BINARY,)
) -> Callable[[Endpoint], Endpoint]:
    """Add an endpoint that returns `send_file` for GET and HEAD, with its responses documented."""
    responses: dict[int | str, dict[str, Any]] = {
        200: {
            "content": {media_type: {} for media_type in media_types},
            "description": "The file. Its ETag is its sha256",
        },
        206: {"description": "The requested range"},
        302: {"description": "The Location is a signed URL of the bucket that has the file"},
        304: {"description": "The file has the ETag in If-None-Match"},
        **documented(*problems, RangeNotSatisfiable, FileUnreadable),
    }

    def add(endpoint: Endpoint) -> Endpoint:
        router.get(path, response_class=Response, responses=responses)(endpoint)
        return router.head(path, include_in_schema=False)(endpoint)

    return add


def send_file(
    request: Request, file: File, *, store: Store, headers: Mapping[str, str] | None = None, redirect: bool = True
) -> Response:
    """Return the response to GET or HEAD: 200, 206 for one range, 302 to the bucket that has the file, or 304.

    A GET reads the blob once to verify it, since a flipped bit in a safetensors file would load silently. Later
    requests rely on that for some minutes while the file does not change. Raises `FileUnreadable` before it sends a
    byte of a damaged file, and `RangeNotSatisfiable`. Anything but one well-formed range gets the whole file, as
    RFC 9110 (14.2) permits. HEAD never redirects: signed URLs are for GET, and expire.
    """
    etag = f'"{file.sha256}"'
    is_get = request.method == "GET"
    sent = {**(headers or {}), "ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
    if _matches(request.headers.get("if-none-match"), etag):
        if is_get:
            PULLS.labels("unchanged").inc()
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=sent)
    span = RANGE.fullmatch(request.headers.get("range", "").strip())
    if span and span[2] and int(span[2]) < int(span[1]):
        span = None
    if span and not _overlaps(span, file.size) and request.headers.get("if-range", etag) == etag:
        detail = f"The file has {file.size} bytes; the range {span[0]!r} is outside of it."
        raise RangeNotSatisfiable(detail, headers={**sent, "Content-Range": f"bytes */{file.size}"})
    media_type = MEDIA_TYPES.get("." + file.path.rpartition(".")[2], BINARY)
    url = None
    try:
        url = store.presigned_url(file.sha256, size=file.size) if redirect else None
        path = store.fetch(file.sha256, recheck=False) if is_get and url is None else None
        size = path.stat().st_size if path else store.stat(file.sha256).size
    except (BlobMissing, BlobCorrupt):
        size = None
    if size != file.size:
        raise FileUnreadable(
            f"{file.path} is damaged or missing in the store, and is not sent. Restore the blob {file.sha256}, "
            "or apply the same edits again."
        )
    if url is not None:
        sent |= {"X-Linked-Etag": etag, "X-Linked-Size": str(file.size)}
        if is_get:
            del sent["ETag"]  # it is the file's, not this response's
            PULLS.labels("redirected").inc()
            sent |= {"Location": url, "Cache-Control": "no-store"}
            return Response(status_code=HTTPStatus.FOUND, headers=sent)
    if path is None:
        return Response(headers={**sent, "Content-Length": str(file.size)}, media_type=media_type)
    return _BlobResponse(path, headers=sent, media_type=media_type, whole=span is None)


class _BlobResponse(FileResponse):
    """Starlette's file response, which ignores a malformed range instead of refusing it."""

    chunk_size = CHUNK  # each takes a turn of the event loop and of a thread; a client holds about two

    def __init__(self, *arguments: Any, whole: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.whole = whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.whole:
            scope = {**scope, "headers": [pair for pair in Headers(scope=scope).raw if pair[0] != b"range"]}

        async def send_and_count(message: Message) -> None:
            await send(message)
            PULLED_BYTES.inc(len(message.get("body", b"")))

        PULLS.labels("sent").inc()
        await super().__call__(scope, receive, send_and_count)


def _matches(header: str | None, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag in tags


def _overlaps(span: re.Match[str], size: int) -> bool:
    first, _, suffix = span.groups()
    return int(first) < size if first is not None else int(suffix) > 0 and size > 0
