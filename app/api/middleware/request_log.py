"""A line in the log for each request, an id by which a client can ask about it, and a count for Prometheus."""

import re
import time
from collections.abc import Callable
from typing import Any

import structlog
from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils.compat import uuid7

from app.observability.metrics import REQUEST_SECONDS, REQUESTS

HEADER = "X-Request-ID"
GIVEN = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"

log = structlog.get_logger()


class RequestLog:
    """Middleware: takes the client's `X-Request-ID` or makes one, answers with it, logs and counts under it.

    Routes find it in `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._templates: dict[Callable[..., Any], str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if GIVEN.fullmatch(given) else str(uuid7())
        scope.setdefault("state", {})["request_id"] = request_id
        application = scope["app"]  # of the pages, once they were asked
        started, status = time.perf_counter(), 500
        began: float | None = None

        async def answer(message: Message) -> None:
            nonlocal status, began
            if message["type"] == "http.response.start":
                status, began = int(message["status"]), time.perf_counter()
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, answer)
            finally:
                seconds = round(time.perf_counter() - started, 4)
                log.info("request", method=scope["method"], path=scope["path"], status=status, seconds=seconds)
                method = scope["method"] if scope["method"] in METHODS else "other"
                route = self._template(scope, application)
                REQUESTS.labels(method, route, str(status)).inc()
                REQUEST_SECONDS.labels(method, route).observe((began or time.perf_counter()) - started)

    def _template(self, scope: Scope, application: Any) -> str:
        """The path of the route that was chosen, with its parameters unfilled; that of what is mounted, by its root."""
        if self._templates is None:
            found = iter_route_contexts(application.routes)
            self._templates = {route.endpoint: route.path for route in found if route.path and route.endpoint}
        if "endpoint" not in scope:
            return UNMATCHED
        return self._templates.get(scope["endpoint"]) or scope.get("root_path") or UNMATCHED
