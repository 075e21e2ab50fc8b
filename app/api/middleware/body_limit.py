"""Caps on request bodies, before anything reads them: how large one may be, and how long it may take to arrive."""

import asyncio
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.problems import ContentTooLarge, respond

SMALL = 2**20
"""Bytes of a body where no route of `LARGE` takes it."""
LARGE = (
    r"/v1/models/[^/]+/edits/batch",
    r"/v1/models/[^/]+/statistics",  # captions
    r"/v1/models/[^/]+/apply",  # 20,000 ids
    r"/v1/images",
    r"/admin/models/[^/]+/edits",  # with reference images
)
RATE = 16 * 1024
"""Bytes a second that a body must come in at least, once `patience` is over."""
CLOSE = {"Connection": "close"}


class BodyLimit:
    """Middleware: 413 where a body is declared, or turns out, to be larger than its path takes, 408 where it comes too
    slowly.

    The paths of `large` take `max_bytes`, others `SMALL`. A body has `patience` seconds and one more for each `RATE`
    bytes that came: slow senders are let go, while a large body may come over a thin line.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, patience: float, large: Sequence[str] = LARGE, rate: int = RATE
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.patience = patience
        self.rate = rate
        self.large = re.compile("|".join(large))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most = self.max_bytes if self.large.fullmatch(scope["path"]) else min(SMALL, self.max_bytes)
        detail = f"A body may have at most {most} bytes here."
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            response = respond(Request(scope), ContentTooLarge(detail, headers=CLOSE))
            return await response(scope, receive, send)
        received, more, deadline = 0, True, asyncio.get_running_loop().time() + self.patience

        async def counted() -> Message:
            nonlocal received, more
            if not more:
                return await receive()  # that the client has gone
            # Errors are HTTPExceptions, since FastAPI lets no other out of the reading of a body.
            try:
                async with asyncio.timeout_at(deadline + received / self.rate):
                    message = await receive()
            except TimeoutError:
                slow = f"The body came too slowly: send it within {self.patience:g} s, or faster than {self.rate} B/s."
                raise HTTPException(408, detail=slow, headers=CLOSE) from None
            more = message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, detail=detail, headers=CLOSE)
            return message

        await self.app(scope, counted, send)
