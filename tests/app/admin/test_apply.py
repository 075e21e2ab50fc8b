"""Apply by a form: which edits, the dry run, and exactly what it showed."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Checkpoint, Edit, Model, Statistics
from tests.app.admin.conftest import Browser, hidden
from tests.app.admin.test_routes import loaded
from tests.app.checkpoints.conftest import add_edit, add_version, statistics
from tests.app.conftest import Headers

__all__ = ["add_edit", "statistics"]

APPLY = "/admin/models/emoji/apply"


@pytest.fixture
def applier(signed_in_with: Callable[..., Browser]) -> Browser:
    return signed_in_with("read", "apply")


def boxes(page: str, name: Any) -> Any:
    return re.findall(rf'<input type="checkbox" name="{name}" value="([^"]+)"', page)


def confirm(browser: Browser, plan: Any) -> Any:
    """Post what the page of a dry run holds, by its button Apply."""
    return browser.post(APPLY, data=hidden(plan) | {"do": "apply"}, follow_redirects=False)


def checkpoints(session: Session) -> Any:
    return session.scalars(select(Checkpoint).order_by(Checkpoint.number)).all()


class TestChoice:
    def test_what_is_checked_stays_through_filters(
        self, applier: Browser, add_edit: Callable[..., Edit], statistics: Statistics
    ) -> None:
        cat, dog = add_edit("cat"), add_edit("dog")
        add_edit("queued cat", state="queued")
        assert boxes(loaded(applier, APPLY), "/edits") == [str(dog.id), str(cat.id)]
        fields = {"do": "show", "start": "", "/edits": [str(dog.id)], "/notes": "LEGAL-42"}
        shown = applier.submit(APPLY, APPLY, **fields, text="CAT").text
        assert boxes(shown, "/edits") == [str(cat.id)]
        assert hidden(shown)["/edits"] == [str(dog.id)] and "LEGAL-42" in shown
        again = applier.submit(APPLY, APPLY, **fields).text
        assert f'value="{dog.id}" checked' in again and f'value="{cat.id}">' in again

    def test_from_a_version(
        self, applier: Browser, add_edit: Callable[..., Edit], model: Model, statistics: Statistics, session: Session
    ) -> None:
        cat, dog, fox = add_edit("cat"), add_edit("dog"), add_edit("fox")
        add_version(session, model, statistics, 1, edits=[cat, dog])
        session.commit()
        page = loaded(applier, f"{APPLY}?from=v1")
        assert (boxes(page, "/remove"), boxes(page, "/add")) == ([str(cat.id), str(dog.id)], [str(fox.id)])
        fields = {"start": "v1", "/remove": [str(cat.id)], "/add": [str(fox.id)]}
        plan = applier.submit(APPLY, APPLY, **fields, do="plan").text
        assert confirm(applier, plan).headers["Location"] == "/admin/models/emoji/checkpoints/v2"
        made = checkpoints(session)[-1]
        assert [edit.edit_id for edit in made.edits] == [dog.id, fox.id]
        assert made.parent_id is not None
        assert applier.get(f"{APPLY}?from=v9").status_code == 404


class TestDryRun:
    def test_conflicts_come_first_and_nothing_is_changed(
        self, applier: Browser, add_edit: Callable[..., Edit], statistics: Statistics, session: Session
    ) -> None:
        cat, twin = add_edit("cat"), add_edit("CAT")
        before = session.scalars(select(AuditEvent.sequence)).all()
        ids = [str(cat.id), str(twin.id)]
        plan = applier.submit(APPLY, APPLY, start="", do="plan", **{"/edits": ids, "/alias": "production"})
        assert plan.status_code == 200
        assert "Same source" in plan.text and "production is created" in plan.text
        assert checkpoints(session) == [] and session.scalars(select(AuditEvent.sequence)).all() == before

    def test_confirmed_it_is_what_the_api_would_do(
        self, applier: Browser, add_edit: Callable[..., Edit], statistics: Statistics, session: Session
    ) -> None:
        cat = add_edit("cat")
        fields = {"/alias": "production", "/notes": "LEGAL-42", "/alpha": "0.25", "/layers": "1, 2", "start": "*"}
        plan = applier.submit(APPLY, APPLY, do="plan", **fields).text
        assert confirm(applier, plan).headers["Location"] == "/admin/models/emoji/checkpoints/v1"
        made = checkpoints(session)[0]
        assert (made.alias, made.notes, made.alpha, made.layers) == ("production", "LEGAL-42", 0.25, [1, 2])
        event = session.scalars(select(AuditEvent).order_by(AuditEvent.sequence.desc()).limit(1)).one()
        assert (event.action, event.reason) == ("checkpoint.apply", "LEGAL-42")
        assert (event.actor, event.details["edits"]) == (made.created_by, [str(cat.id)])
        building = loaded(applier, "/admin/models/emoji/checkpoints/v1")
        assert 'hx-get="/admin/models/emoji/checkpoints/v1?seen=building"' in building

    def test_what_changed_meanwhile_is_shown_and_not_applied(
        self, applier: Browser, add_edit: Callable[..., Edit], statistics: Statistics, session: Session
    ) -> None:
        add_edit("cat")
        plan = applier.submit(APPLY, APPLY, start="*", do="plan").text
        add_edit("dog")
        answer = confirm(applier, plan)
        assert answer.status_code == 409
        assert "has changed since the dry run" in answer.text and "Dry run: 2 edits" in answer.text
        assert checkpoints(session) == []
        assert confirm(applier, answer.text).status_code == 303

    def test_an_alias_that_moved_meanwhile_is_shown(
        self,
        applier: Browser,
        add_edit: Callable[..., Edit],
        model: Model,
        statistics: Statistics,
        session: Session,
        client: TestClient,
        keys: Mapping[str, Headers],
    ) -> None:
        for number in (1, 2):
            add_version(session, model, statistics, number, edits=[add_edit(f"cat {number}")])
        session.commit()
        url, headers = "/v1/models/emoji/aliases/production", keys["apply"] | {"If-Match": "*"}
        client.put(url, headers=keys["apply"], json={"version": "v1"})
        plan = applier.submit(APPLY, APPLY, start="*", do="plan", **{"/alias": "production"}).text
        assert "production moves from v1" in plan
        client.put(url, headers=headers, json={"version": "v2"})
        answer = confirm(applier, plan)
        assert (answer.status_code, "production moves from v2" in answer.text) == (409, True)
        assert len(checkpoints(session)) == 2

    def test_without_a_dry_run_nothing_is_applied(
        self, applier: Browser, add_edit: Callable[..., Edit], statistics: Statistics, session: Session
    ) -> None:
        add_edit("cat")
        assert applier.submit(APPLY, APPLY, start="*", do="apply").status_code == 409
        assert checkpoints(session) == []

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"start": ""}, "at least one edit id"),
            ({"/alpha": "2"}, 'id="/alpha"[^>]* aria-invalid'),
            ({"/alias": "v3"}, 'id="/alias"[^>]* aria-invalid'),
            ({"/layers": "9"}, 'id="/layers"[^>]* aria-invalid'),
            ({"start": "v9"}, "no version or alias"),
            ({"start": "", "/edits": ["x"]}, "There is no edit"),
            ({"/erase_scale": "2"}, "is a setting of the method"),
        ],
    )
    def test_what_is_wrong_stands_in_the_form(
        self,
        applier: Browser,
        add_edit: Callable[..., Edit],
        statistics: Statistics,
        session: Session,
        wrong: dict[str, Any],
        said: str,
    ) -> None:
        add_edit("cat")
        fields = {"start": "*", "/notes": "LEGAL-42", "/alias": "", "/alpha": "", "/layers": "", "/erase_scale": ""}
        answer = applier.submit(APPLY, APPLY, do="plan", **fields | wrong)
        assert answer.status_code in (404, 422), answer.text
        assert re.search(said, answer.text), answer.text
        assert "LEGAL-42" in answer.text and "<h1>Apply edits</h1>" in answer.text
        assert checkpoints(session) == []
