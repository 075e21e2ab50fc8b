"""Aliases move only from where the form showed them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import Alias, AuditEvent, Edit, Model, Statistics
from tests.app.admin.conftest import Browser, hidden
from tests.app.admin.test_apply import applier
from tests.app.admin.test_routes import loaded
from tests.app.checkpoints.conftest import add_edit, add_version, statistics
from tests.app.conftest import Headers

__all__ = ["add_edit", "applier", "statistics"]

MOVE = "/admin/models/emoji/move-alias"
ALIAS = "/admin/models/emoji/aliases/production"


@pytest.fixture
def versions(add_edit: Callable[..., Edit], model: Model, statistics: Statistics, session: Session) -> None:
    for number in (1, 2, 3):
        state = "retracted" if number == 3 else "published"
        add_version(session, model, statistics, number, edits=[add_edit(f"cat {number}")], state=state)
    session.commit()


def move(browser: Browser, page: str, **fields: Any) -> Any:
    return browser.post(MOVE, data=hidden(page) | fields, follow_redirects=False)


def pointed_at(session: Session) -> Any:
    return session.scalars(select(Alias).execution_options(populate_existing=True)).one().checkpoint.number


def test_a_move_says_from_where_to_where_and_its_history_rolls_back(
    applier: Browser, versions: None, session: Session
) -> None:
    page = loaded(applier, f"{MOVE}?alias=production&version=v1")
    assert "does not exist yet" in page
    assert move(applier, page).headers["Location"] == ALIAS
    page = loaded(applier, f"{MOVE}?alias=production&version=v2")
    assert "Move production from v1 to v2" in page
    assert move(applier, page, **{"/reason": "LEGAL-42"}).status_code == 303
    event = session.scalars(select(AuditEvent).order_by(AuditEvent.sequence.desc()).limit(1)).one()
    assert (event.action, event.reason, event.before) == ("alias.move", "LEGAL-42", {"version": "v1"})
    history = loaded(applier, ALIAS)
    (back,) = re.findall(r'href="([^"]+)">Roll back to v1', history)
    page = loaded(applier, back.replace("&amp;", "&"))
    assert "Move production from v2 to v1" in page
    move(applier, page)
    assert pointed_at(session) == 1


def test_a_lost_race_is_shown(
    applier: Browser, client: TestClient, keys: Mapping[str, Headers], versions: None, session: Session
) -> None:
    first = loaded(applier, f"{MOVE}?alias=production&version=v1")
    url = "/v1/models/emoji/aliases/production"
    client.put(url, headers=keys["apply"], json={"version": "v2"})
    lost = move(applier, first, **{"/reason": "LEGAL-42"})
    assert lost.status_code == 412
    assert "The alias &#39;production&#39; exists" in lost.text
    assert "Move production from v2 to v1" in lost.text and "LEGAL-42" in lost.text
    client.put(url, headers=keys["apply"] | {"If-Match": "*"}, json={"version": "v1"})
    client.put(url, headers=keys["apply"] | {"If-Match": "*"}, json={"version": "v2"})
    assert move(applier, lost.text).status_code == 412  # as it is again, but not as it was seen
    assert pointed_at(session) == 2


@pytest.mark.parametrize(
    ("alias", "version", "said"),
    [
        ("v1", "v2", "cannot be an alias"),
        ("production", "production", "should match pattern"),
        ("<b>", "v1", "&lt;b&gt;"),
    ],
)
def test_what_names_no_move_is_said(applier: Browser, versions: None, alias: str, version: str, said: str) -> None:
    answer = applier.get(MOVE, params={"alias": alias, "version": version})
    assert answer.status_code == 422
    assert said in answer.text and "<b>" not in answer.text


@pytest.mark.parametrize(("version", "status"), [("v9", 422), ("v3", 410)])
def test_only_to_a_version_that_is_served(applier: Browser, versions: None, version: str, status: int) -> None:
    page = loaded(applier, f"{MOVE}?alias=production&version={version}")
    assert move(applier, page).status_code == status


def test_who_may_only_read_sees_the_history_alone(
    reader: Browser, client: TestClient, keys: Mapping[str, Headers], versions: None
) -> None:
    client.put("/v1/models/emoji/aliases/production", headers=keys["apply"], json={"version": "v1"})
    assert "move-alias" not in loaded(reader, ALIAS)
    assert reader.get("/admin/models/emoji/aliases/nothing").status_code == 404
