"""Send a blob of the store over HTTP: strong ETag, conditional requests, ranges; checked against its sha256 first, or
left to a bucket that the client is sent to."""

import re
from collections.abc import Mapping
from pathlib import Path

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from app.checkpoints.errors import FileUnreadable, RangeNotSatisfiable
from app.checkpoints.service import ServedFile
from app.observability.metrics import PULLED_BYTES, PULLS
from app.storage.store import CHUNK, BlobCorrupt, BlobMissing, Store

MEDIA_TYPES = {
    ".png": "image/png",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))")


def deliver(
    request: Request, file: ServedFile, *, store: Store, headers: Mapping[str, str], redirect: bool = True
) -> Response:
    """The answer to GET or HEAD: 200, 206 for one range, 302 to the bucket that has the file, 304, 416.

    A GET reads the blob once to verify it, since a flipped bit in a safetensors file would load silently; what asks for
    it or for ranges of it within the next minutes relies on that while nothing writes to the file. Raises
    `FileUnreadable` rather than send a byte of a damaged one, and `RangeNotSatisfiable`. What is no single well-formed
    range is answered whole, as RFC 9110 (14.2) permits. HEAD never redirects: the signed URL is for GET,
    and runs out. Without `redirect`, nor does GET.
    """
    tag = f'"{file.sha256}"'
    headers = {**headers, "ETag": tag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
    if _holds(request.headers.get("if-none-match"), tag):
        if request.method == "GET":
            PULLS.labels("unchanged").inc()
        return Response(status_code=304, headers=headers)
    found = RANGE.fullmatch(request.headers.get("range", "").strip())
    if found and found[2] and int(found[2]) < int(found[1]):
        found = None
    if found and not _satisfiable(found, file.size) and request.headers.get("if-range", tag) == tag:
        detail = f"The file has {file.size} bytes; the range {found[0]!r} lies outside."
        raise RangeNotSatisfiable(detail, headers={**headers, "Content-Range": f"bytes */{file.size}"})
    path: Path | None = None
    try:
        url = store.presigned_url(file.sha256, size=file.size) if redirect else None
        if request.method == "HEAD" or url is not None:
            size = store.stat(file.sha256).size
        else:
            path = store.fetch(file.sha256, recheck=False)
            size = path.stat().st_size
        damaged = size != file.size
    except (BlobMissing, BlobCorrupt):
        damaged = True
    if damaged:
        raise FileUnreadable(
            f"{file.path} is damaged or missing in the store, and is not sent. Restore the blob {file.sha256}, "
            "or apply the same edits again."
        )
    if url is not None:
        headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(file.size)}
        if request.method == "GET":
            del headers["ETag"]  # of the file, not of this answer
            PULLS.labels("redirected").inc()
            return Response(status_code=302, headers={**headers, "Location": url, "Cache-Control": "no-store"})
    suffix = "." + file.path.rpartition(".")[2]
    media_type = MEDIA_TYPES.get(suffix, "application/octet-stream")
    if path is None:
        return Response(headers={**headers, "Content-Length": str(file.size)}, media_type=media_type)
    return _BlobResponse(path, headers=headers, media_type=media_type, whole=found is None)


class _BlobResponse(FileResponse):
    """Starlette's file response, which leaves aside a range that we do not honour instead of refusing it."""

    chunk_size = CHUNK  # each has a turn of the event loop and of a thread; a client holds about two

    def __init__(self, *arguments: object, whole: bool, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.whole = whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.whole:
            scope = {**scope, "headers": [pair for pair in Headers(scope=scope).raw if pair[0] != b"range"]}

        async def count(message: Message) -> None:
            await send(message)
            PULLED_BYTES.inc(len(message.get("body", b"")))

        PULLS.labels("sent").inc()
        await super().__call__(scope, receive, count)


def _holds(header: str | None, tag: str) -> bool:
    tags = [item.strip().removeprefix("W/") for item in (header or "").split(",")]
    return "*" in tags or tag in tags


def _satisfiable(found: re.Match[str], size: int) -> bool:
    first, _, suffix = found.groups()
    return int(first) < size if first is not None else int(suffix) > 0 and size > 0
