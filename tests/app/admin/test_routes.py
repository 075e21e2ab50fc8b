"""What each page shows."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db.models import Alias, Edit, EditValue, Evaluation, Job, Model, Statistics
from app.storage.local import LocalStore
from editing.files import File
from tests.app.admin.conftest import Browser
from tests.app.checkpoints.conftest import Service, add_edit, add_version, statistics
from tests.app.conftest import Headers
from tests.app.edits.test_routes import EDIT

__all__ = ["add_edit", "statistics"]

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture
def create(client: TestClient, keys: Mapping[str, Headers], model: Model) -> Callable[..., str]:
    def post(**fields: Any) -> Any:
        answer = client.post("/v1/models/emoji/edits", headers=keys["edit"], json=EDIT | fields)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    return post


def loaded(browser: Browser, url: Any, status: int = 200) -> Any:
    answer = browser.get(url)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r"<script(?! src=\"/admin/static/)", answer.text)
    assert "<img src=x" not in answer.text
    return answer.text


def rows(page: str) -> Any:
    """The first cell of each row of each table, as text."""
    return [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r'<th scope="row">(.*?)</th>', page, re.DOTALL)]


class TestOverview:
    def test_empty(self, reader: Browser) -> None:
        page = loaded(reader, "/admin/")
        for said in ("No model is registered.", "No worker has claimed a job.", "has failed."):
            assert said in page

    def test_queue_workers_and_failures(self, reader: Browser, create: Callable[..., str], session: Session) -> None:
        waiting, running, failed = create(), create(source="running"), create(source="failed")
        columns = {"worker": "worker-1", "started_at": datetime.now(UTC)}
        session.execute(update(Job).where(Job.target_id == running).values(state="running", **columns))
        problem = {"title": "Not finite", "detail": f"The loss of {HOSTILE} is not finite.", "errors": []}
        columns |= {"worker": "worker-2", "finished_at": datetime.now(UTC), "problem": problem}
        session.execute(update(Job).where(Job.target_id == failed).values(state="failed", **columns))
        session.commit()
        page = loaded(reader, "/admin/")
        assert re.findall(r"<dd>(.*?)</dd>", page)[:2] == ["1", "1"]
        assert re.search(r"<dd>\d+ s</dd>", page)
        assert {"worker-1", "worker-2", f"edit {failed}", "emender/emoji"} <= set(rows(page))
        assert "The loss of &lt;script&gt;" in page
        assert waiting not in page

    def test_newest_versions(
        self, reader: Browser, add_edit: Callable[..., Edit], model: Model, statistics: Statistics, session: Session
    ) -> None:
        for number, state in ((1, "published"), (2, "published"), (3, "failed")):
            version = add_version(session, model, statistics, number, edits=[add_edit(f"cat {number}")], state=state)
            if number == 2:
                session.add(Alias(model_id=model.id, name="production", checkpoint_id=version.id))
        session.commit()
        page = loaded(reader, "/admin/")
        assert 'href="/admin/models/emoji/checkpoints/v2"' in page
        assert '<span class="alias">production</span>' in page
        assert "/checkpoints/v1" not in page
        assert "/checkpoints/v3" not in page

    def test_a_failed_version_is_named(
        self, reader: Browser, add_edit: Callable[..., Edit], model: Model, statistics: Statistics, session: Session
    ) -> None:
        version = add_version(session, model, statistics, 1, edits=[add_edit("cat")], state="failed")
        session.add(Job(kind="build_checkpoint", target_id=version.id, state="failed", finished_at=datetime.now(UTC)))
        session.commit()
        assert "emoji v1" in rows(loaded(reader, "/admin/"))


class TestEdits:
    def test_filters(self, reader: Browser, create: Callable[..., str], session: Session) -> None:
        cat, dog = create(source="a Cat 100%"), create(source="dog")
        session.execute(update(Edit).where(Edit.id == dog).values(state="ready"))
        session.commit()
        found = {
            query: rows(loaded(reader, f"/admin/models/emoji/edits?{query}"))
            for query in ("text=&state=", "text=cat", "state=ready", "text=cat&state=ready", "text=%25", "text=_")
        }
        assert found == {
            "text=&state=": ["dog", "a Cat 100%"],
            "text=cat": ["a Cat 100%"],
            "state=ready": ["dog"],
            "text=cat&state=ready": [],
            "text=%25": ["a Cat 100%"],  # no wildcard
            "text=_": [],
        }
        assert f"/admin/edits/{cat}" in loaded(reader, "/admin/models/emoji/edits?text=cat")
        assert reader.get("/admin/models/emoji/edits?state=odd").status_code == 422
        assert reader.get("/admin/models/nothing/edits").status_code == 404

    def test_pages_keep_the_filter(self, reader: Browser, create: Callable[..., str]) -> None:
        for number in range(5):
            create(source=f"cat {number}")
        create(source="dog")
        url: str | None = "/admin/models/emoji/edits?text=cat&limit=2"
        seen: list[str] = []
        while url:
            page = loaded(reader, url)
            seen += rows(page)
            following = re.search(r'href="(\?[^"]+)" rel="next"', page)
            url = "/admin/models/emoji/edits" + following[1].replace("&amp;", "&") if following else None
        assert seen == [f"cat {number}" for number in (4, 3, 2, 1, 0)]

    def test_hostile_text_is_text(self, reader: Browser, create: Callable[..., str]) -> None:
        create(source=HOSTILE, destination={"prompt": f"new {HOSTILE}"})
        page = loaded(reader, "/admin/models/emoji/edits")
        assert page.count("&lt;script&gt;") == 2
        searched = reader.get("/admin/models/emoji/edits", params={"text": HOSTILE}).text
        assert "<script" not in searched and "<img" not in searched
        assert searched.count("&lt;script&gt;") == 3

    @pytest.mark.parametrize(
        ("destination", "shown"),
        [
            ({"erase": True}, "erased"),
            ({"erase": True, "neutral": "art"}, "erased to <bdi>art</bdi>"),
            ({"balance": {"female doctor": 0.5, "male doctor": 0.5}}, "<bdi>male doctor</bdi> 0.5"),
        ],
    )
    def test_destinations(
        self, reader: Browser, create: Callable[..., str], destination: dict[str, Any], shown: str
    ) -> None:
        create(destination=destination)
        assert shown in loaded(reader, "/admin/models/emoji/edits")


class TestEdit:
    def test_request(self, reader: Browser, create: Callable[..., str]) -> None:
        page = loaded(reader, f"/admin/edits/{create(reason=HOSTILE, labels={'ticket': HOSTILE}, source=HOSTILE)}")
        for said in ("an image of {}", "Joe Biden", "&#34;optimization_steps&#34;: 20", "queued"):
            assert said in page
        assert page.count("&lt;script&gt;") == 4  # title, heading, reason, label

    def test_losses_are_drawn(self, reader: Browser, add_edit: Callable[..., Edit], session: Session) -> None:
        edit = add_edit("cat")
        losses = {"text": [8.0, 4.0, 2.0], "noise": [0.0, 0.0, 0.0]}
        encoders = [{"name": "text_encoder", "layer": 2, "delta_norm": 3.25, "hidden_norm": 27.5}]
        values = update(EditValue).where(EditValue.edit_id == edit.id).values(losses=losses, encoders=encoders)
        session.execute(values)
        session.commit()
        page = loaded(reader, f"/admin/edits/{edit.id}")
        points = re.findall(r'<polyline class="curve" points="([^"]+)"', page)
        assert len(points) == 1  # what is zero all along is not drawn
        heights = [float(point.split(",")[1]) for point in points[0].split()]
        assert heights == sorted(heights) and len(heights) == 3
        assert "8 at first, 2 after 3 steps" in page
        assert "3.25" in page and "27.5" in page

    def test_why_it_failed(self, reader: Browser, add_edit: Callable[..., Edit]) -> None:
        problem = {"title": "Not finite", "detail": HOSTILE, "errors": []}
        edit = add_edit("cat", state="failed", problem=problem)
        assert "<strong>Not finite.</strong>" in loaded(reader, f"/admin/edits/{edit.id}")

    def test_progress(self, reader: Browser, create: Callable[..., str], session: Session) -> None:
        edit = create()
        progress = {"stage": "optimizing", "done": 5, "total": 20, "text_loss": 1.0}
        session.execute(update(Job).where(Job.target_id == edit).values(state="running", progress=progress))
        session.commit()
        assert '<progress max="20" value="5"' in loaded(reader, f"/admin/edits/{edit}")

    def test_events_are_for_admins(self, reader: Browser, admin: Browser, create: Callable[..., str]) -> None:
        edit = create()
        assert "edit.create" in loaded(admin, f"/admin/edits/{edit}")
        assert "edit.create" not in loaded(reader, f"/admin/edits/{edit}")


@pytest.fixture
def version(
    client: TestClient,
    keys: Mapping[str, Headers],
    add_edit: Callable[..., Edit],
    model: Model,
    statistics: Statistics,
    session: Session,
    store: LocalStore,
) -> Any:
    """v1, published with a warning, a preview and an alias."""
    edit = add_edit(HOSTILE)
    file = File("text_encoder/model.safetensors", store.put(b"weights"), 7)
    made = add_version(session, model, statistics, 1, edits=[edit], files=[file])
    made.report = {
        "relative_residuals": {str(edit.id): 0.75},
        "layers": [{"encoder": "text_encoder", "layer": 2, "relative_norm": 0.0125, "condition": 1234.5}],
        "conflicts": [{"kind": "same key", "edits": [str(edit.id), str(edit.id)], "cosine": 0.91}],
    }
    picture = b"\x89PNG\r\n\x1a\n not really"
    files = [{"path": name, "sha256": store.put(picture), "size": len(picture)} for name in ("grid.png", "report.json")]
    session.add(
        Evaluation(
            checkpoint_id=made.id,
            kind="preview",
            state="ready",
            request={"prompts": [HOSTILE]},
            report={"prompts": [HOSTILE]},
            files=files,
            created_by="test",
        )
    )
    session.commit()
    client.put("/v1/models/emoji/aliases/production", headers=keys["apply"], json={"version": "v1"})
    return made


URL = "/admin/models/emoji/checkpoints"


class TestCheckpoints:
    def test_list(self, reader: Browser, version: Any) -> None:
        assert rows(loaded(reader, URL)) == ["production", "v1"]
        assert reader.get("/admin/models/nothing/checkpoints").status_code == 404

    def test_one(self, reader: Browser, version: Any) -> None:
        page = loaded(reader, f"{URL}/v1")
        for said in ("75 %", "left undone", "0.0125", "text_encoder 2", "model.safetensors", "same key", "cosine 0.91"):
            assert said in page, said
        assert "&lt;script&gt;" in page
        assert reader.get(f"{URL}/production").text == page
        assert reader.get(f"{URL}/v9").status_code == 404

    def test_pictures_are_served_under_the_session(
        self, reader: Browser, browser: Browser, version: Any, session: Session
    ) -> None:
        evaluation = session.scalars(select(Evaluation)).one()
        url = f"{URL}/v1/evaluations/{evaluation.id}"
        page = loaded(reader, url)
        assert f'<img src="{url}/files/grid.png"' in page
        picture = reader.get(f"{url}/files/grid.png")
        assert (picture.status_code, picture.headers["Content-Type"]) == (200, "image/png")
        assert picture.content.startswith(b"\x89PNG")
        report = reader.get(f"{url}/files/report.json")
        assert report.headers["Content-Disposition"].startswith("attachment")
        assert reader.get(f"{url}/files/nothing.png").status_code == 404
        assert browser.get(f"{url}/files/grid.png", follow_redirects=False).status_code == 303

    def test_scores(self, reader: Browser, version: Any, session: Session) -> None:
        report = {
            "scores": {"sf": 0.5, "s2d_template": 0.4, "s2d": 0.31, "hd": -0.02, "f1": 0.3},
            "edits": [
                {
                    "edit": str(version.edits[0].edit_id),
                    "source": HOSTILE,
                    "destination": None,
                    "before": 0.9,
                    "after": 0.1,
                    "destination_score": None,
                    "succeeded": False,
                }
            ],
        }
        session.execute(update(Evaluation).values(kind="check", report=report))
        session.commit()
        evaluation = session.scalars(select(Evaluation)).one()
        page = loaded(reader, f"{URL}/v1/evaluations/{evaluation.id}")
        assert "0.310" in page and "erased" in page
        assert "is still recognized, with confidence 0.10" in loaded(reader, f"{URL}/v1")  # the check's warning

    def test_difference(self, service: Service, browser_of: Callable[[Service], Browser]) -> None:
        browser = browser_of(service)
        for source in ("cat", "dog"):
            service.apply(edits=[str(service.edit(source))])
        page = loaded(browser, "/admin/models/tiny/checkpoints/v2/difference?against=v1")
        assert "<caption>Added</caption>" in page and "<caption>Removed</caption>" in page
        assert {"cat", "dog"} <= set(rows(page))
        assert "mlp.fc2.weight" in page
        assert "v2</a> against base" in loaded(browser, "/admin/models/tiny/checkpoints/v2/difference")
        assert browser.get("/admin/models/tiny/checkpoints/v2/difference?against=v9").status_code == 404
        assert "no version" not in loaded(browser, "/admin/models/tiny/checkpoints/v2")

    def test_a_version_that_failed(
        self, reader: Browser, add_edit: Callable[..., Edit], model: Model, statistics: Statistics, session: Session
    ) -> None:
        version = add_version(session, model, statistics, 1, edits=[add_edit("cat")], state="failed")
        version.problem = {"title": "Out of memory", "detail": HOSTILE, "errors": []}
        session.commit()
        page = loaded(reader, f"{URL}/v1")
        assert "<strong>Out of memory.</strong>" in page
        assert "Compare with" not in page


class TestAudit:
    def test_filters(self, admin: Browser, create: Callable[..., str]) -> None:
        edit = create(reason=HOSTILE)
        page = loaded(admin, f"/admin/audit?actor=&action=edit.create&target=&edit={edit}&since=&until=")
        assert len(rows(page)) == 1
        assert "&lt;script&gt;" in page
        assert f'value="{edit}"' in page
        assert "No event matches." in loaded(admin, "/admin/audit?since=2999-01-01T00:00")

    def test_pages(self, admin: Browser, create: Callable[..., str]) -> None:
        for _ in range(60):
            create()
        page = loaded(admin, "/admin/audit?action=edit.create")
        following = re.search(r'href="(\?[^"]+)" rel="next"', page)
        assert following is not None
        older = loaded(admin, "/admin/audit" + following[1].replace("&amp;", "&"))
        assert len(rows(page)) == 50 and len(rows(older)) == 10
        assert not set(rows(page)) & set(rows(older))

    def test_export(self, admin: Browser, create: Callable[..., str]) -> None:
        edit = create(reason=HOSTILE)
        create()
        page = loaded(admin, f"/admin/audit?edit={edit}&until=")
        exports = [url.replace("&amp;", "&") for url in re.findall(r'href="(/admin/audit/export[^"]+)"', page)]
        lines, table = [admin.get(url) for url in exports]
        assert [json.loads(line)["reason"] for line in lines.text.splitlines()] == [HOSTILE]
        assert lines.headers["Content-Type"] == "application/x-ndjson"
        assert table.headers["Content-Type"].startswith("text/csv")
        assert table.headers["Content-Disposition"] == 'attachment; filename="audit.csv"'
        assert len(list(csv.DictReader(io.StringIO(table.text)))) == 1


class TestModel:
    def test_its_statistics_and_an_estimate_of_new_ones(
        self, admin: Browser, reader: Browser, model: Model, statistics: Statistics, session: Session
    ) -> None:
        page = loaded(reader, "/admin/models/emoji")
        assert "c" * 64 in page and "text_encoder: 4 layers" in page
        assert "Estimate" not in page
        url = "/admin/models/emoji/statistics"
        refused = admin.submit("/admin/models/emoji", url, **{"/captions": HOSTILE, "/samples": "5"})
        assert refused.status_code == 422 and "&lt;script&gt;" in refused.text
        session.add(Statistics(model_id=model.id, state="estimating", captions_name="more", created_by="test"))
        session.commit()
        assert "hx-get" in loaded(reader, "/admin/models/emoji")
        under_way = admin.submit("/admin/models/emoji", url, **{"/captions": "captions"})
        assert under_way.status_code == 409


class Markup(HTMLParser):
    """The links of a page, without their queries, and what no page of ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.strange: list[tuple[str, Any]] = []

    def handle_starttag(self, tag: Any, attributes: Any) -> None:
        given = dict(attributes)
        ours = all(
            (given.get(name) or "/admin/").startswith(("/admin/", "#", "?")) for name in ("src", "href", "action")
        )
        if not ours or any(name.startswith("on") for name in given) or tag == "script" and "defer" not in given:
            self.strange.append((tag, attributes))
        if tag == "a" and given["href"].startswith("/admin/"):
            self.links.add(given["href"].partition("?")[0].partition("#")[0])


def test_no_string_of_a_client_is_markup_on_any_page(
    admin: Browser,
    client: TestClient,
    keys: Mapping[str, Headers],
    application: FastAPI,
    model: Model,
    statistics: Statistics,
    version: Any,
    session: Session,
) -> None:
    """Every page that links lead to from the overview."""
    model.license = {"id": "other", "name": HOSTILE, "link": f"javascript:{HOSTILE}"}
    session.execute(update(Edit).values(reason=HOSTILE, labels={HOSTILE: HOSTILE}, destination={"prompt": HOSTILE}))
    version.notes = HOSTILE
    version.options = version.options | {"preserve": [HOSTILE]}
    created = client.post("/v1/keys", headers=keys["admin"], json={"name": HOSTILE, "scopes": ["admin"]}).json()
    browser = Browser(application, raise_server_exceptions=False)
    browser.sign_in({"Authorization": f"Bearer {created['token']}"})
    client.post("/v1/models/emoji/edits", headers=keys["edit"], json=EDIT | {"source": HOSTILE, "reason": HOSTILE})
    problem = {"title": HOSTILE, "detail": HOSTILE, "errors": []}
    session.execute(update(Job).values(state="failed", problem=problem, finished_at=datetime.now(UTC)))
    session.commit()
    seen, waiting = set(), ["/admin/"]
    while waiting:
        url = waiting.pop()
        seen.add(url)
        answer = browser.get(url)
        assert answer.status_code in (200, 500 if "difference" in url else 200), url
        if answer.headers["Content-Type"].startswith("text/html"):
            read = Markup()
            read.feed(answer.text)
            assert read.strange == [], url
            waiting += [link for link in read.links if link not in seen | set(waiting)]
    assert len(seen) > 15, seen
