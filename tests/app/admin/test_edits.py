"""Edits are asked for, cancelled and tried again by forms, as by the API."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Edit, Image, Model
from tests.app.admin.conftest import Browser
from tests.app.admin.test_routes import HOSTILE, create, loaded
from tests.app.checkpoints.conftest import add_edit
from tests.app.conftest import Headers
from tests.app.images.test_routes import encoded

__all__ = ["add_edit", "create"]

NEW = "/admin/models/emoji/edits/new"
EDITS = "/admin/models/emoji/edits"
GIVEN = {"/source": "dog", "kind": "prompt", "/destination/prompt": "cat", "/reason": "LEGAL-42"}


@pytest.fixture
def editor(signed_in_with: Callable[..., Browser]) -> Browser:
    return signed_in_with("read", "edit")


def newest(session: Session) -> Any:
    return session.scalars(select(AuditEvent).order_by(AuditEvent.sequence.desc())).first()


class TestPost:
    def test_is_the_edit_that_the_api_would_make(
        self, editor: Browser, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        settings = {"/settings/optimization_steps": "30", "/settings/objective": "text", "/templates": "a {}\r\n{}"}
        answer = editor.submit(NEW, EDITS, **GIVEN, **settings)
        assert answer.status_code == 303, answer.text
        edit = answer.headers["Location"].removeprefix("/admin/edits/")
        made = client.get(f"/v1/edits/{edit}", headers=keys["read"]).json()
        assert (made["source"], made["destination"], made["templates"]) == ("dog", {"prompt": "cat"}, ["a {}", "{}"])
        assert (made["settings"]["optimization_steps"], made["settings"]["objective"]) == (30, "text")
        event = newest(session)
        actor = client.get("/v1/edits", headers=keys["read"]).json()["items"][0]["created_by"]
        assert (event.action, event.actor, event.reason) == ("edit.create", actor, "LEGAL-42")
        assert event.request_id == answer.headers["X-Request-ID"]
        loaded(editor, answer.headers["Location"])

    @pytest.mark.parametrize(
        ("fields", "made"),
        [
            ({"kind": "erase", "/destination/neutral": "art"}, {"erase": True, "neutral": "art"}),
            ({"kind": "erase"}, {"erase": True}),
            ({"kind": "balance", "/destination/balance": "1 cat\n3 red cat"}, {"balance": {"cat": 1, "red cat": 3}}),
        ],
    )
    def test_destinations(
        self, editor: Browser, model: Model, session: Session, fields: dict[str, Any], made: dict[str, Any]
    ) -> None:
        """What was typed for another kind of destination is not sent."""
        assert editor.submit(NEW, EDITS, **GIVEN | fields).status_code == 303
        assert session.scalars(select(Edit)).one().destination == made

    def test_with_images(self, editor: Browser, model: Model, session: Session) -> None:
        files = [("files", (f"{n}.png", encoded(color=(n, 2, 3)), "image/png")) for n in (1, 2)]
        answer = editor.submit(NEW, EDITS, files=files, **GIVEN | {"kind": "images"})
        assert answer.status_code == 303, answer.text
        images = session.scalars(select(Edit)).one().destination["images"]
        assert len(images) == 2
        assert images[0] in loaded(editor, answer.headers["Location"])
        picture = editor.get(f"/admin/images/{images[0]}")
        assert (picture.headers["Content-Type"], picture.content[:4]) == ("image/png", b"\x89PNG")
        actions = session.scalars(select(AuditEvent.action).order_by(AuditEvent.sequence)).all()
        assert actions[-3:] == ["image.add", "image.add", "edit.create"]

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"/source": ""}, "/source"),
            ({"/destination/prompt": ""}, "/destination/prompt"),
            ({"kind": "images"}, "/destination/images"),
            ({"kind": "balance", "/destination/balance": "much cat\n1 dog"}, "/destination/balance"),
            ({"kind": "balance", "/destination/balance": ""}, "/destination/balance"),
            ({"/settings/optimization_steps": "many"}, "/settings/optimization_steps"),
            ({"/settings/layer": "99"}, "/settings/layer"),
            ({"/templates": "no place for it"}, "/templates"),
            ({"/source": "a\0b"}, "/source"),
        ],
    )
    def test_what_is_wrong_stands_at_its_field(
        self, editor: Browser, model: Model, session: Session, wrong: dict[str, Any], said: str
    ) -> None:
        typed = GIVEN | {"/reason": HOSTILE} | wrong
        answer = editor.submit(NEW, EDITS, **typed)
        assert answer.status_code == 422, answer.text
        (field,) = re.findall(rf'<(?:input|textarea) id="{said}"[^>]*>', answer.text)
        assert 'aria-invalid="true"' in field
        assert f'<a href="#{said}">' in answer.text
        assert "&lt;script&gt;" in answer.text and "<script" not in answer.text
        if "/destination/balance" in wrong:
            assert wrong["/destination/balance"] in answer.text
        assert session.scalars(select(Edit)).all() == []

    def test_images_stay_where_something_else_is_wrong(self, editor: Browser, model: Model, session: Session) -> None:
        files = [
            ("files", ("a.png", encoded(color=(1, 2, 3)), "image/png")),
            ("files", (f"{HOSTILE}.png", b"no image", "image/png")),
        ]
        refused = editor.submit(NEW, EDITS, files=files, **GIVEN | {"kind": "images"})
        assert refused.status_code == 422
        assert "is not a PNG, JPEG or WebP" in refused.text and "&lt;script&gt;" in refused.text
        kept = f"sha256:{session.scalars(select(Image.sha256)).one()}"
        assert f'name="/destination/images" value="{kept}" checked' in refused.text
        again = editor.submit(NEW, EDITS, **GIVEN | {"kind": "images", "/destination/images": kept})
        assert again.status_code == 303, again.text
        assert session.scalars(select(Edit)).one().destination == {"images": [kept]}

    def test_more_images_than_an_edit_takes_are_not_even_decoded(
        self, editor: Browser, model: Model, session: Session
    ) -> None:
        files = [("files", (f"{n}.png", encoded(color=(n, 2, 3)), "image/png")) for n in range(65)]
        refused = editor.submit(NEW, EDITS, files=files, **GIVEN | {"kind": "images"})
        assert (refused.status_code, "at most 64 images" in refused.text) == (422, True)
        assert session.scalars(select(Image)).all() == []


class TestActions:
    def test_cancel_and_retry(self, editor: Browser, create: Callable[..., str], session: Session) -> None:
        edit = f"/admin/edits/{create()}"
        assert 'action="' + edit + '/cancel"' in loaded(editor, edit)
        for action in ("cancel", "retry"):
            assert editor.submit(edit, f"{edit}/{action}").headers["Location"] == edit
            assert newest(session).action == f"edit.{action}"
        loaded(editor, edit)

    def test_what_cannot_be_done_is_said_on_the_page(self, editor: Browser, add_edit: Callable[..., Edit]) -> None:
        edit = f"/admin/edits/{add_edit('cat').id}"
        answer = editor.submit(edit, f"{edit}/retry")
        assert answer.status_code == 409
        assert "only a failed or cancelled edit can be retried" in answer.text and "<h2>Value</h2>" in answer.text

    def test_who_may_only_read_sees_no_buttons(self, reader: Browser, create: Callable[..., str]) -> None:
        for url in (f"/admin/edits/{create()}", EDITS):
            page = loaded(reader, url)
            assert page.count("<button") == page.count("Filter</button>") + page.count("Sign out</button>")
            assert "New edit" not in page and "Apply" not in page

    def test_progress_is_followed_until_the_edit_has_ended(
        self, reader: Browser, create: Callable[..., str], add_edit: Callable[..., Edit]
    ) -> None:
        edit = f"/admin/edits/{create()}"
        page = loaded(reader, edit)
        assert f'hx-get="{edit}?seen=queued"' in page
        assert "script-src 'self'" in reader.get(edit).headers["Content-Security-Policy"]
        ended = loaded(reader, f"/admin/edits/{add_edit('cat').id}?seen=optimizing")
        assert "hx-get" not in ended and "<script" not in ended
        assert "Now ready." in ended

    def test_a_session_that_has_ended_is_said_to_htmx(self, browser: Browser, create: Callable[..., str]) -> None:
        answer = browser.get(f"/admin/edits/{create()}", headers={"HX-Request": "true"}, follow_redirects=False)
        assert (answer.status_code, answer.headers["HX-Refresh"]) == (401, "true")
