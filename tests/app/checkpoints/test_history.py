"""Where an alias pointed on a given day."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert
from sqlalchemy.orm import Session

from app.checkpoints.files import store_content
from app.db.models import AliasMove, Edit, Model, Statistics
from app.storage.local import LocalStore
from tests.app.checkpoints.conftest import add_version
from tests.app.conftest import Headers

URL = "/v1/models/emoji/aliases/production/history"


@pytest.fixture
def moved(
    session: Session, model: Model, statistics: Statistics, store: LocalStore, add_edit: Callable[..., Edit]
) -> None:
    """v1 on the 2nd at noon, v2 at three in the afternoon, deleted on the 4th, v1 again on the 6th."""
    edit, file = add_edit("fox"), store_content(store, "a", b"a")
    one, two = (add_version(session, model, statistics, number, edits=[edit], files=[file]) for number in (1, 2))
    moves = [(2, 12, None, one), (2, 15, one, two), (4, 9, two, None), (6, 9, None, one)]
    for day, hour, before, after in moves:
        row = {
            "model_id": model.id,
            "name": "production",
            "from_checkpoint_id": before and before.id,
            "to_checkpoint_id": after and after.id,
            "moved_by": f"key:{day}",
            "moved_at": datetime(2026, 11, day, hour, tzinfo=UTC),
        }
        session.execute(insert(AliasMove).values(row))
    session.commit()


@pytest.fixture
def history(client: TestClient, keys: Mapping[str, Headers], moved: None) -> Callable[..., Any]:
    def read(**query: Any) -> Any:
        answer = client.get(URL, headers=keys["read"], params=query)
        assert answer.status_code == 200, answer.text
        return [
            (period["version"], period["since"][8:13], (period["until"] or "")[8:13])
            for period in answer.json()["items"]
        ]

    return read


def test_periods_newest_first(history: Callable[..., Any]) -> None:
    assert history() == [
        ("v1", "06T09", ""),
        (None, "04T09", "06T09"),
        ("v2", "02T15", "04T09"),
        ("v1", "02T12", "02T15"),
    ]


@pytest.mark.parametrize(
    ("at", "versions"),
    [
        ("2026-11-01", []),
        ("2026-11-02", ["v2", "v1"]),
        ("2026-11-03", ["v2"]),
        ("2026-11-04", [None, "v2"]),
        ("2026-11-05", [None]),
        ("2026-11-07", ["v1"]),
        ("2026-11-02T11:59:59Z", []),
        ("2026-11-02T12:00:00Z", ["v1"]),
        ("2026-11-02T15:00:00Z", ["v2"]),
        ("2026-11-02T14:00:00-02:00", ["v2"]),
        ("2026-11-03T00:00:00Z", ["v2"]),
        ("9999-12-31", ["v1"]),
        ("0001-01-01", []),
    ],
)
def test_at_a_moment_or_on_a_day(history: Callable[..., Any], at: str, versions: Any) -> None:
    assert [version for version, *_ in history(at=at)] == versions


def test_pages(client: TestClient, keys: Mapping[str, Headers], moved: None) -> None:
    url: str | None = URL + "?limit=3"
    seen: list[str] = []
    while url:
        answer = client.get(url, headers=keys["read"])
        seen += [period["moved_by"] for period in answer.json()["items"]]
        url = answer.links["next"]["url"] if "next" in answer.links else None
    assert seen == ["key:6", "key:4", "key:2", "key:2"]


@pytest.mark.parametrize("query", ["at=yesterday", "at=2026-11-31", "at=2026-11-02T12:00:00", "cursor=0", "limit=0"])
def test_bad_questions(client: TestClient, keys: Mapping[str, Headers], moved: None, query: str) -> None:
    assert client.get(f"{URL}?{query}", headers=keys["read"]).status_code == 422


def test_no_such_alias(client: TestClient, keys: Mapping[str, Headers], moved: None) -> None:
    assert client.get(URL.replace("production", "staging"), headers=keys["read"]).status_code == 404
    assert client.get(URL.replace("emoji", "other"), headers=keys["read"]).status_code == 404


def test_moves_are_timed_one_after_the_other(
    client: TestClient, keys: Mapping[str, Headers], moved: None, session: Session
) -> None:
    """Moves have the time of the move. The start of the transaction can be earlier than the previous move."""
    before = session.connection().exec_driver_sql("SELECT now()").scalar_one()
    client.put("/v1/models/emoji/aliases/staging", headers=keys["apply"], json={"version": "v1"})
    answer = client.get(URL.replace("production", "staging"), headers=keys["read"])
    assert datetime.fromisoformat(answer.json()["items"][0]["since"]) > before
