"""Rate limits, counted in this process or in a real Redis."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError

from app.api.rate_limit import RateLimits
from app.main import create_app
from app.problems import TooManyRequests
from app.settings import Settings
from tests.app.conftest import Headers
from tests.servers import RedisServer, require_redis

pytestmark = pytest.mark.security

WRONG = "Bearer em_0123456789ab_wrong"


@pytest.fixture
def limited(application: FastAPI, settings: Settings) -> Callable[..., Any]:
    """Set other limits of the application."""

    def limit(**limits: Any) -> None:
        application.state.rate_limits = RateLimits(settings.model_copy(update=limits))

    return limit


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Any]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


class TestRequests:
    def test_a_key_over_its_limit_gets_429(
        self, client: TestClient, keys: Mapping[str, Headers], limited: Callable[..., Any]
    ) -> None:
        limited(rate_limit="3/minute")
        answers = [client.get("/v1/models", headers=keys["read"]) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        left = [re.fullmatch(r'"api";r=(\d+);t=(\d+)', answer.headers["RateLimit"]) for answer in answers]
        assert [int(found[1]) for found in left if found] == [2, 1, 0, 0]
        assert all(0 < int(found[2]) <= 60 for found in left if found)
        assert {answer.headers["RateLimit-Policy"] for answer in answers} == {'"api";q=3;w=60'}
        refused = answers[-1]
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert left[-1] and int(refused.headers["Retry-After"]) == int(left[-1][2])
        assert "3 per 1 minute" in refused.json()["detail"]

    def test_keys_and_addresses_have_limits_of_their_own(
        self, client: TestClient, keys: Mapping[str, Headers], limited: Callable[..., Any]
    ) -> None:
        limited(rate_limit="1/minute")
        assert client.get("/v1/models", headers=keys["read"]).status_code == 200
        assert client.get("/v1/models", headers=keys["edit"]).status_code == 403
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models").status_code == 429
        assert client.get("/v1/models", headers=keys["read"]).status_code == 429

    def test_the_hub_protocol_is_limited(
        self, client: TestClient, keys: Mapping[str, Headers], limited: Callable[..., Any]
    ) -> None:
        limited(rate_limit="1/minute")
        first = client.head("/emender/nobody/resolve/main/x", headers=keys["read"])
        assert (first.status_code, first.headers["RateLimit"][:9]) == (404, '"api";r=0')
        second = client.head("/emender/nobody/resolve/main/x", headers=keys["read"])
        assert (second.status_code, second.headers["RateLimit"][:9]) == (429, '"api";r=0')
        assert int(second.headers["Retry-After"]) > 0

    def test_limits_can_be_turned_off(
        self, client: TestClient, keys: Mapping[str, Headers], limited: Callable[..., Any]
    ) -> None:
        limited(rate_limit="off", failed_auth_rate_limit="off")
        for _ in range(40):
            answer = client.get("/v1/models", headers={"Authorization": WRONG})
            assert answer.status_code == 401
        assert "RateLimit" not in answer.headers

    def test_health_checks_are_not_limited(self, client: TestClient, limited: Callable[..., Any]) -> None:
        limited(rate_limit="1/minute")
        for path in ("/healthz", "/readyz"):
            assert [client.get(path).status_code for _ in range(3)] == [200] * 3

    def test_ipv6_addresses_share_the_limit_of_their_network(
        self, application: FastAPI, limited: Callable[..., Any]
    ) -> None:
        limited(rate_limit="1/minute")

        def ask(host: Any) -> Any:
            with TestClient(application, client=(host, 1)) as client:
                return client.get("/v1/models").status_code

        seen = [ask(host) for host in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "192.0.2.1", "192.0.2.2")]
        assert seen == [401, 429, 401, 401, 401]


class TestInvalidKeys:
    def test_an_address_that_guesses_keys_gets_429(
        self, client: TestClient, keys: Mapping[str, Headers], limited: Callable[..., Any]
    ) -> None:
        """The guesses have different public parts. A valid key of the same address still works."""
        limited(failed_auth_rate_limit="3/minute")
        guesses = [{"Authorization": f"Bearer em_{number:012x}_wrong"} for number in range(4)]
        assert [client.get("/v1/models", headers=guess).status_code for guess in guesses] == [401, 401, 401, 429]
        assert client.get("/v1/models", headers=keys["read"]).status_code == 200

    def test_a_key_whose_secret_was_guessed_is_refused_even_with_the_right_secret(
        self, client: TestClient, keys: Mapping[str, Headers], limited: Callable[..., Any]
    ) -> None:
        """So that no guess is confirmed. Other keys of the address still work."""
        limited(failed_auth_rate_limit="3/minute")
        right = keys["read"]["Authorization"]
        wrong = right[:-1] + ("A" if right[-1] != "A" else "B")
        statuses = [client.get("/v1/models", headers={"Authorization": wrong}).status_code for _ in range(3)]
        assert statuses == [401] * 3
        locked = client.get("/v1/models", headers=keys["read"])
        assert (locked.status_code, locked.json()["title"]) == (429, "Too many requests")
        assert client.get("/v1/models", headers=keys["admin"]).status_code == 200

    def test_malformed_tokens_share_one_limit(self, client: TestClient, limited: Callable[..., Any]) -> None:
        limited(failed_auth_rate_limit="2/minute")
        sent = [client.get("/v1/models", headers={"Authorization": f"Bearer hf_{n}"}).status_code for n in range(3)]
        assert sent == [401, 401, 429]


def remaining(limits: RateLimits, actor: str) -> int:
    found = re.match(r'"api";r=(\d+)', limits.count("198.51.100.1", token="em_", actor=actor)["RateLimit"])
    assert found is not None
    return int(found[1])


class TestRedis:
    def test_processes_share_their_counters(self, settings: Settings, redis_server: Any) -> None:
        given = settings.model_copy(update={"rate_limit": "2/minute", "redis_url": SecretStr(redis_server.url)})
        one, other = RateLimits(given), RateLimits(given)
        assert (remaining(one, "key:a"), remaining(other, "key:a")) == (1, 0)
        with pytest.raises(TooManyRequests):
            remaining(one, "key:a")
        assert remaining(other, "key:b") == 1
        with redis_server.client() as redis:
            assert all(0 < redis.ttl(key) <= 60 for key in redis.keys())

    def test_requests_succeed_without_a_redis_that_has_ended(self, settings: Settings, redis_server: Any) -> None:
        given = settings.model_copy(update={"rate_limit": "2/minute", "redis_url": SecretStr(redis_server.url)})
        limits = RateLimits(given)
        assert remaining(limits, "key:a") == 1
        redis_server.kill()
        assert [remaining(limits, "key:a"), remaining(limits, "key:a")] == [1, 0]
        with pytest.raises(TooManyRequests):
            remaining(limits, "key:a")

    def test_the_application_starts_without_its_redis(self, settings: Settings) -> None:
        nowhere = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
        with TestClient(create_app(nowhere)) as client:
            assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize("text", ["", "many", "0/minute", "3/fortnight", "1/second;5/minute", "5", "-1/second"])
def test_an_invalid_rate_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="such as 600/minute"):
        Settings(rate_limit=text)
