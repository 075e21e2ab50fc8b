"""Rate limits: of requests per API key or address, and of requests with invalid API keys per address.

Windows are fixed. Responses have the headers of draft-ietf-httpapi-ratelimit-headers-09, which Hub clients read.
"""

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network

import structlog
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import FixedWindowRateLimiter

from app.observability.metrics import LIMITED_REQUESTS
from app.problems import TooManyRequests
from app.settings import OFF, Settings

REDIS_TIMEOUT_SECONDS = 0.5
REDIS_PAUSE_SECONDS = 10.0  # in which a process counts alone after a failure
TOKEN = re.compile(r"em_([0-9a-f]{12})_")
log = structlog.get_logger()


class RateLimits:
    """Counters in Redis, which all processes share. Without Redis, or while it fails, each process counts alone."""

    def __init__(self, settings: Settings) -> None:
        self.requests = _parse(settings.rate_limit)
        self.failed_auth = _parse(settings.failed_auth_rate_limit)
        self._local = FixedWindowRateLimiter(MemoryStorage())
        self._redis = _open_redis(settings.redis_url.get_secret_value()) if settings.redis_url else None
        self._shared = FixedWindowRateLimiter(self._redis) if self._redis else None
        self._shared_again = 0.0  # monotonic seconds

    def count(self, host: str, *, token: str | None = None, actor: str | None = None) -> Mapping[str, str]:
        """Count a request and return the headers that tell the client its limit.

        `actor` is the key of a valid token. Raises `TooManyRequests`. An address that sent too many wrong tokens with
        one public part is refused with the valid one too, so that no guess is confirmed.
        """
        client = host
        with suppress(ValueError):
            if isinstance(ip_address(host), IPv6Address):  # one host has every address of its network
                client = str(ip_network(f"{host}/64", strict=False))
        if self._shared is not None and time.monotonic() >= self._shared_again:
            try:
                return self._count(self._shared, client, token, actor)
            except StorageError as error:
                self._shared_again = time.monotonic() + REDIS_PAUSE_SECONDS
                reason = type(error.storage_error).__name__
                log.warning("Redis is unavailable; this process counts requests alone", error=reason)
        return self._count(self._local, client, token, actor)

    def _count(
        self, limiter: FixedWindowRateLimiter, client: str, token: str | None, actor: str | None
    ) -> Mapping[str, str]:
        guesses = ("wrong-key", client, found[1] if (found := TOKEN.match(token or "")) else "")
        if self.failed_auth and token is not None and not limiter.test(self.failed_auth, *guesses):
            raise _refuse(limiter, self.failed_auth, guesses, "Requests with a wrong secret for this API key")
        headers: Mapping[str, str] = {}
        if self.requests:
            requests = ("requests", actor or client)
            if not limiter.hit(self.requests, *requests):
                raise _refuse(limiter, self.requests, requests, "Requests")
            reset_at, remaining = limiter.get_window_stats(self.requests, *requests)
            headers = {
                "RateLimit": f'"api";r={remaining};t={max(1, round(reset_at - time.time()))}',
                "RateLimit-Policy": f'"api";q={self.requests.amount};w={self.requests.get_expiry()}',
            }
        if self.failed_auth and token is not None and actor is None:
            if not limiter.hit(self.failed_auth, "wrong-keys", client):
                raise _refuse(limiter, self.failed_auth, ("wrong-keys", client), "Requests with invalid API keys")
            limiter.hit(self.failed_auth, *guesses)
        return headers

    def redis_responds(self) -> bool | None:
        """Return whether Redis responds, or None if the settings name none."""
        return None if self._redis is None else self._redis.check()


def _refuse(
    limiter: FixedWindowRateLimiter, limit: RateLimitItem, counter: tuple[str, ...], what: str
) -> TooManyRequests:
    LIMITED_REQUESTS.labels(counter[0]).inc()
    seconds = max(1, round(limiter.get_window_stats(limit, *counter).reset_time - time.time()))
    headers = {
        "RateLimit": f'"api";r=0;t={seconds}',
        "RateLimit-Policy": f'"api";q={limit.amount};w={limit.get_expiry()}',
        "Retry-After": str(seconds),
    }
    return TooManyRequests(f"{what} are limited to {limit}; retry in {seconds} s.", headers=headers)


def _parse(limit: str) -> RateLimitItem | None:
    return None if limit == OFF else parse(limit)


def _open_redis(url: str) -> Storage:
    if url.startswith("unix://"):
        url = "redis+" + url
    # Without retries: those of redis-py take seconds, and the request can be counted in this process instead.
    timeouts = {"socket_timeout": REDIS_TIMEOUT_SECONDS, "socket_connect_timeout": REDIS_TIMEOUT_SECONDS, "retry": None}
    storage = storage_from_string(url, wrap_exceptions=True, key_prefix="emender", **timeouts)  # type: ignore[arg-type]
    assert isinstance(storage, Storage)
    return storage
