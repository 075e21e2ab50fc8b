"""Transactions of requests under load."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.testclient import TestClient

from app.db.models import Model
from tests.app.conftest import Headers

EDIT = {"source": "apple", "destination": {"prompt": "pear"}}


def test_more_requests_than_threads_and_connections_starve_nobody(
    live_client: TestClient, live_keys: Mapping[str, Headers], live_model: Model
) -> None:
    """None of them waits for a connection that another holds while it waits for a thread."""

    def ask(number: Any) -> Any:
        if number % 2:
            return live_client.get("/v1/edits", headers=live_keys["read"]).status_code
        return live_client.post("/v1/models/emoji/edits", headers=live_keys["edit"], json=EDIT).status_code

    with ThreadPoolExecutor(120) as pool:
        assert sorted(set(pool.map(ask, range(240)))) == [200, 202]
