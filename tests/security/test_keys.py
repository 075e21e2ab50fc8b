"""Row 19: keys that are guessed, and a key that is revoked while it downloads; on a real server."""

import hmac
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.auth import service
from app.checkpoints.files import store_content
from app.db.models import Model, Statistics
from app.settings import Settings
from app.storage.local import LocalStore
from tests.app.checkpoints.conftest import add_version, ready_edit
from tests.app.conftest import Headers, issue_keys
from tests.security.servers import Server, start_api
from tests.seeded import WEIGHTS

SIZE = 48 * 2**20  # more than the sockets on the way hold
FILE = f"/v1/models/emoji/checkpoints/v1/files/{WEIGHTS}"


@pytest.fixture
def api(
    settings: Settings, clean_database: Engine, live_model: Model, store: LocalStore, tmp_path: Path
) -> Iterator[Server]:
    """With a version that has a large file."""
    with Session(clean_database, expire_on_commit=False) as session:
        keys = issue_keys(session)
        columns = {"state": "ready", "captions_name": "t", "digest": "c" * 64, "created_by": "test"}
        statistics = Statistics(model_id=live_model.id, **columns)
        session.add(statistics)
        session.flush()
        edit = ready_edit(session, live_model, "fox", width=64, layer=2)
        model = session.get_one(Model, live_model.id)
        files = [store_content(store, WEIGHTS, bytes(SIZE))]
        add_version(session, model, statistics, 1, edits=[edit], files=files)
    with start_api(settings, keys, log=tmp_path / "api.log") as server:
        yield server


def test_a_key_revoked_during_a_download_serves_no_later_request(api: Server) -> None:
    """A running response ends; later requests, also for the rest of the file, are refused at once."""
    made = api.client.post("/v1/keys", headers=api.keys["admin"], json={"name": "a", "scopes": ["read"]}).json()
    headers = {"Authorization": f"Bearer {made['token']}"}
    with api.client.stream("GET", FILE, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        chunks = answer.iter_bytes(2**16)
        had = len(next(chunks))
        assert api.client.delete(f"/v1/keys/{made['id']}", headers=api.keys["admin"]).status_code == 204
        for method, extra in (("GET", {"Range": f"bytes={had}-"}), ("GET", {}), ("HEAD", {})):
            assert api.client.request(method, FILE, headers=headers | extra).status_code == 401
        answered = api.client.get(FILE, headers=headers | {"If-None-Match": answer.headers["ETag"]})
        assert answered.status_code == 401
        assert had + sum(map(len, chunks)) == SIZE


def test_guessing_keys_is_limited(client: TestClient, keys: Mapping[str, Headers], settings: Settings) -> None:
    """Of thousands of guesses thirty are looked up; who knows a key is served meanwhile."""
    prefix = keys["read"]["Authorization"].split("_")[1]
    statuses = []
    for number in range(200):
        guess = {"Authorization": f"Bearer em_{prefix}_{number:043d}"}
        statuses.append(client.get("/v1/models", headers=guess).status_code)
    assert statuses == [401] * 30 + [429] * 170
    waiting = client.get("/v1/models", headers=guess)
    assert int(waiting.headers["Retry-After"]) > 0
    assert waiting.headers["Content-Type"] == "application/problem+json"
    assert client.get("/v1/models", headers=keys["admin"]).status_code == 200
    # Guessing at ever other prefixes is one client's guessing all the same.
    others = [f"em_{number:012x}_{'x' * 43}" for number in range(40)]
    found = [client.get("/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code for token in others]
    assert set(found) == {429}


def test_secrets_are_compared_in_constant_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their digests, and also where there is no such key: the same work for each guess."""
    compared, true_compare = [], hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return true_compare(one, other)

    monkeypatch.setattr("app.auth.service.hmac.compare_digest", compare)
    _, token = service.create_key(session, name="a", scopes=["read"], actor="test")
    prefix = token.split("_")[1]
    for guess in (f"em_{prefix}_x", "em_000000000000_x", token):
        service.find_principal(session, token=guess)
    assert compared == [(32, 32)] * 3
