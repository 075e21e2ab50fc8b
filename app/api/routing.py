"""Route classes: `APIRouter(route_class=Route)`, or `TransactionRoute` for protocols that others define.

A `def` endpoint runs in one thread and one transaction, which is committed before the response is sent. No request
holds a connection outside of its thread, so a thread that waits for a connection always gets one.
"""

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message

from app.api import idempotency, strict_json
from app.api.transactions import run_in_transaction
from app.problems import MalformedBody
from app.settings import Settings

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

SMALL_BODY_BYTES = 2**20
"""Maximum size of a body, unless the endpoint is marked with `accept_large_body`."""
MIN_BYTES_PER_SECOND = 16 * 1024
"""Rate at which a body must arrive after the first `body_timeout_seconds`."""
CLOSE = {"Connection": "close"}


def accept_large_body(endpoint: Endpoint) -> Endpoint:
    """Let the endpoint take bodies of up to `max_body_bytes`. Goes below `@router.post(…)`."""
    endpoint.__dict__["accepts_large_body"] = True
    return endpoint


class TransactionRoute(APIRoute):
    """Run `def` endpoints in a transaction. Limit the size of bodies and the time in which they arrive."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        self.accepts_large_body = getattr(endpoint, "accepts_large_body", False)
        if not inspect.iscoroutinefunction(endpoint):
            endpoint = self.in_transaction(endpoint, **options)
        super().__init__(path, endpoint, **options)

    def in_transaction(self, endpoint: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return run_in_transaction(endpoint)

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        if (self.methods or set()) <= {"GET", "HEAD"}:
            return handle

        async def handle_body(request: Request) -> Response:
            settings: Settings = request.app.state.settings
            limit = (
                settings.max_body_bytes if self.accepts_large_body else min(SMALL_BODY_BYTES, settings.max_body_bytes)
            )
            start, received = asyncio.get_running_loop().time(), 0

            async def receive() -> Message:
                """Return the next part of the body. FastAPI lets HTTPExceptions through and hides other errors."""
                nonlocal received
                deadline = start + settings.body_timeout_seconds + received / MIN_BYTES_PER_SECOND
                try:
                    async with asyncio.timeout_at(deadline):
                        message = await request.receive()
                except TimeoutError:
                    detail = (
                        f"The body arrived too slowly: send it within {settings.body_timeout_seconds:g} s, "
                        f"or faster than {MIN_BYTES_PER_SECOND} bytes per second."
                    )
                    raise HTTPException(408, detail=detail, headers=CLOSE) from None
                received += len(message.get("body", b""))
                if received > limit:
                    raise HTTPException(413, detail=too_large, headers=CLOSE)
                return message

            too_large = f"The body may have at most {limit} bytes."
            declared = request.headers.get("content-length", "")
            if declared.isdecimal() and int(declared) > limit:
                raise HTTPException(413, detail=too_large, headers=CLOSE)
            limited = Request(request.scope, receive, request._send)
            if self.body_field is not None and "json" in request.headers.get("content-type", ""):
                if body := await limited.body():
                    try:
                        limited._json = strict_json.loads(body)  # FastAPI reads it from there
                    except JSONDecodeError as error:
                        raise MalformedBody(f"The body is not JSON: {error.msg}.") from None
            return await handle(limited)

        return handle_body


class Route(TransactionRoute):
    """Take `Idempotency-Key` with every POST."""

    def in_transaction(self, endpoint: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if "POST" in (options.get("methods") or ()):
            return idempotency.run_once(endpoint, status_code=options.get("status_code") or 200)
        return super().in_transaction(endpoint)
