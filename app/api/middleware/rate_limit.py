"""How often a client may ask, and how often it may be wrong about its key.

Requests with a valid key are counted for the key, all others for the address that they come from. Windows are fixed;
answers say how much of one is left in the headers of draft-ietf-httpapi-ratelimit-headers-09, which Hub clients read.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Annotated, TypeVar

import structlog
from fastapi import Depends, Request
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability.metrics import REFUSED
from app.problems import Problem
from app.settings import OFF, Settings

REDIS_PATIENCE = 0.5  # seconds that a request waits for Redis before it is counted here
REDIS_PAUSE = 10.0  # seconds in which Redis, once it failed, is not asked again
PREFIX = re.compile(r"em_([0-9a-f]{12})_")

T = TypeVar("T")

log = structlog.get_logger()


class TooManyRequests(Problem):
    status = HTTPStatus.TOO_MANY_REQUESTS
    title = "Too many requests"


@dataclass(frozen=True)
class Window:
    """How much of a client's present window is spent, and when it ends."""

    name: str
    limit: RateLimitItem
    spent: int
    reset_seconds: int

    @property
    def headers(self) -> dict[str, str]:
        left = max(0, self.limit.amount - self.spent)
        return {
            "RateLimit": f'"api";r={left};t={self.reset_seconds}',
            "RateLimit-Policy": f'"api";q={self.limit.amount};w={self.limit.get_expiry()}',
        }

    def check(self, what: str) -> None:
        """Raise `TooManyRequests` where more was spent than the limit; `what` says what is limited."""
        if self.spent > self.limit.amount:
            REFUSED.labels(self.name).inc()
            raise TooManyRequests(
                f"{what} is limited to {self.limit}; retry in {self.reset_seconds} s.",
                headers={**self.headers, "Retry-After": str(self.reset_seconds)},
            )


class RateLimits:
    """The counters: in Redis where the settings name one, so that processes share them; else in this process.

    Redis that does not answer fails no request: for `REDIS_PAUSE` seconds each process then counts for itself.
    """

    def __init__(self, settings: Settings) -> None:
        self.requests = _parse(settings.rate_limit)
        self.wrong_keys = _parse(settings.failed_auth_rate_limit)
        self._here: Storage = MemoryStorage()
        self._shared = _redis(settings.redis_url.get_secret_value()) if settings.redis_url else None
        self._shared_again = 0.0  # monotonic seconds

    def count(self, client: str) -> Window | None:
        """Count a request of `client`; None where requests are not limited. Raises `TooManyRequests`."""
        if self.requests is None:
            return None
        window = self._window(self.requests, "requests", client)
        window.check("How often a client may ask")
        return window

    def check_key(self, address: str, token: str) -> None:
        """Raise `TooManyRequests` where `address` was wrong about this very key too often: it is not looked up again.

        Other keys pass, so that a client with a revoked key does not lock out those who share its address.
        """
        if self.wrong_keys is not None:
            self._window(self.wrong_keys, "wrong-key", address, _prefix(token), cost=0).check("Trying a wrong key")

    def count_wrong_key(self, address: str, token: str) -> None:
        """Count a wrong key; raises `TooManyRequests` where `address` sent too many, of whatever keys."""
        if self.wrong_keys is not None:
            self._window(self.wrong_keys, "wrong-keys", address).check("Sending wrong keys")
            self._window(self.wrong_keys, "wrong-key", address, _prefix(token))

    def redis_answers(self) -> bool | None:
        """None where the settings name no Redis."""
        return None if self._shared is None else self._shared.check()

    def _window(self, limit: RateLimitItem, *identifiers: str, cost: int = 1) -> Window:
        key = limit.key_for(*identifiers)

        def spend(storage: Storage) -> Window:
            spent = storage.incr(key, limit.get_expiry(), cost) if cost else storage.get(key) + 1
            left = storage.get_expiry(key) - time.time()
            return Window(identifiers[0], limit, spent, reset_seconds=max(1, round(left)))

        return self._counted(spend)

    def _counted(self, use: Callable[[Storage], T]) -> T:
        if self._shared is not None and time.monotonic() >= self._shared_again:
            try:
                return use(self._shared)
            except StorageError as error:
                self._shared_again = time.monotonic() + REDIS_PAUSE
                reason = type(error.storage_error).__name__
                log.warning("Redis does not answer; this process counts requests for itself", error=reason)
        return use(self._here)


async def get_rate_limits(request: Request) -> RateLimits:
    limits: RateLimits = request.app.state.rate_limits
    return limits


RateLimitsDep = Annotated[RateLimits, Depends(get_rate_limits)]


def address_of(request: Request) -> str:
    """Where a request comes from, as the server saw it; of IPv6 the /64, since a host has all of its addresses."""
    host = request.client.host if request.client else ""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return str(ip_network((address, 64), strict=False)) if isinstance(address, IPv6Address) else host


class RateLimitHeaders:
    """Middleware: answers to requests that were counted say what is left. Counting is done where a key is checked."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})

        async def answer(message: Message) -> None:
            window: Window | None = state.get("rate_limit")
            if message["type"] == "http.response.start" and window is not None:
                MutableHeaders(scope=message).update(window.headers)
            await send(message)

        await self.app(scope, receive, answer)


def _parse(limit: str) -> RateLimitItem | None:
    return None if limit == OFF else parse(limit)


def _prefix(token: str) -> str:
    """The public half of a token; empty for what is no token of ours, which all counts as one."""
    found = PREFIX.match(token)
    return found[1] if found else ""


def _redis(url: str) -> Storage:
    if url.startswith("unix://"):
        url = "redis+" + url
    # No retries: redis-py's own take seconds, and the request can be counted here instead.
    timeouts = {"socket_timeout": REDIS_PATIENCE, "socket_connect_timeout": REDIS_PATIENCE, "retry": None}
    storage = storage_from_string(url, wrap_exceptions=True, key_prefix="emender", **timeouts)  # type: ignore[arg-type]
    assert isinstance(storage, Storage)
    return storage
