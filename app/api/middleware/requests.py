"""Identify, log and count every request, and set the headers that every response has."""

import re
import time
from collections.abc import Callable
from typing import Any

import structlog
from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils.compat import uuid7

from app.api.middleware.security_headers import HTTPS_HEADERS, SECURITY_HEADERS
from app.api.problems import respond, to_problem
from app.observability.metrics import REQUEST_SECONDS, REQUESTS

REQUEST_ID = "X-Request-ID"
VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"

log = structlog.get_logger()


class RequestMiddleware:
    """Set the request's id, answer its errors, write a log line, update the metrics, and add the response's headers.

    The id is the client's `X-Request-ID` or a new one. `request.state.audit_origin` has it and the client's address,
    as audit events name them. A response may set its own security headers. HTTPS responses get HSTS; behind a proxy,
    uvicorn knows the scheme if `FORWARDED_ALLOW_IPS` trusts it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._paths: dict[Callable[..., Any], str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        requested = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = requested if VALID_ID.fullmatch(requested) else str(uuid7())
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["audit_origin"] = {"request_id": request_id, "address": scope["client"][0] if scope["client"] else None}
        application = scope["app"]  # a mounted application replaces it
        default_headers = SECURITY_HEADERS | (HTTPS_HEADERS if scope["scheme"] == "https" else {})
        start, status = time.perf_counter(), 500
        response_start: float | None = None
        complete = False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, response_start, complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status, response_start = int(message["status"]), time.perf_counter()
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers.update(state.get("rate_limit_headers", {}))
                for name, value in default_headers.items():
                    headers.setdefault(name, value)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_headers)
            except Exception as error:
                if response_start is None:
                    request = Request(scope)
                    await respond(request, to_problem(request, error))(scope, receive, send_with_headers)
                elif not complete:  # the server closes the connection, so that the client notices
                    raise
            finally:
                seconds = time.perf_counter() - start
                log.info(
                    "request", method=scope["method"], path=scope["path"], status=status, seconds=round(seconds, 4)
                )
                method = scope["method"] if scope["method"] in METHODS else "other"
                path = self._path_template(scope, application)
                REQUESTS.labels(method, path, str(status)).inc()
                REQUEST_SECONDS.labels(method, path).observe((response_start or time.perf_counter()) - start)

    def _path_template(self, scope: Scope, application: Any) -> str:
        """Return the path of the matched route with its parameters as names, or the root of a mounted application."""
        if self._paths is None:
            routes = iter_route_contexts(application.routes)
            self._paths = {route.endpoint: route.path for route in routes if route.path and route.endpoint}
        if "endpoint" not in scope:
            return UNMATCHED
        return self._paths.get(scope["endpoint"]) or scope.get("root_path") or UNMATCHED
