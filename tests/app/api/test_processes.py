"""Two API processes on one database and one Redis, as behind a balancer."""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.db.models import Edit, Model
from app.settings import Settings
from tests.app.conftest import Headers
from tests.servers import ApiServer, RedisServer, require_redis

EDITS = "/v1/models/emoji/edits"
EDIT = {"source": "dog", "destination": {"prompt": "cat"}}


@pytest.fixture
def servers(
    settings: Settings, tmp_path: Path, live_model: Model, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ApiServer, ApiServer]]:
    require_redis()
    redis = RedisServer(tmp_path)
    redis.start()
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(metrics))  # as `emender serve` sets it for its processes
    shared = settings.model_copy(update={"redis_url": SecretStr(redis.url), "rate_limit": "100/minute"})
    one, other = (ApiServer(shared, log=tmp_path / f"{name}.log") for name in ("one", "other"))
    try:
        one.start()
        other.start()
        yield one, other
    finally:
        one.stop()
        other.stop()
        redis.kill()


def test_two_processes_share_keys_limits_metrics_and_events(
    servers: tuple[ApiServer, ApiServer], live_keys: Mapping[str, Headers], engine: Engine
) -> None:
    urls = [server.url for server in servers]
    with httpx.Client(trust_env=False, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        key = live_keys["edit"] | {"Idempotency-Key": "one"}
        responses = list(pool.map(lambda n: client.post(urls[n % 2] + EDITS, headers=key, json=EDIT), range(8)))
        assert {response.status_code for response in responses} == {202}
        assert len({response.content for response in responses}) == 1
        with Session(engine) as session:
            assert session.scalar(select(func.count()).select_from(Edit)) == 1

        left = [client.get(f"{url}/v1/edits", headers=live_keys["read"]).headers["RateLimit"] for url in urls * 2]
        assert [int(found[1]) for text in left if (found := re.search(r"r=(\d+)", text))] == [99, 98, 97, 96]

        counts = [
            re.search(r'requests_total\{method="POST".* (\d+)\.0', client.get(f"{url}/metrics").text) for url in urls
        ]
        assert [found and found[1] for found in counts] == ["8", "8"]

        edit_id = responses[0].json()["id"]
        with Session(engine) as session:
            session.execute(update(Edit).values(state="ready"))
            session.commit()
        for url in urls:
            stream = client.get(f"{url}/v1/edits/{edit_id}/events", headers=live_keys["read"]).text
            assert '"state":"ready"' in stream
