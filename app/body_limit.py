"""A cap on request bodies, before anything reads them."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.problems import ContentTooLarge, respond


class BodyLimit:
    """Middleware: 413 where a body is declared, or turns out, to be larger than `max_bytes`."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        detail = f"A body may have at most {self.max_bytes} bytes."
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            response = respond(Request(scope), ContentTooLarge(detail, headers={"Connection": "close"}))
            return await response(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                # An HTTPException, since FastAPI lets no other error out of the reading of a body.
                raise HTTPException(413, detail=detail, headers={"Connection": "close"})
            return message

        await self.app(scope, counted, send)
