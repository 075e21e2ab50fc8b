"""Create, list, read, cancel and retry over HTTP. Batches, waiting and values have modules of their own."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Edit, Job, Model
from editing.edits import StageOneSettings
from tests.app.conftest import Headers

EDIT = {
    "source": "US president",
    "destination": {"prompt": "Joe Biden"},
    "templates": ["an image of {}", "{}"],
    "settings": {"objective": "hybrid", "optimization_steps": 20, "seed": 3},
    "reason": "LEGAL-42: office changed hands",
    "labels": {"ticket": "LEGAL-42"},
}
URL = "/v1/models/emoji/edits"


def changed(**fields: Any) -> Any:
    return EDIT | fields


@pytest.fixture
def create(client: TestClient, keys: Mapping[str, Headers], model: Model) -> Callable[..., dict[str, Any]]:
    def post(**fields: Any) -> Any:
        answer = client.post(URL, headers=keys["edit"], json=changed(**fields))
        assert answer.status_code == 202, answer.text
        return answer.json()

    return post


def refused(answer: Any, status: Any, pointer: Any) -> Any:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert pointer in [error["pointer"] for error in problem["errors"]], problem
    return problem


class TestCreateEdit:
    def test_create_requires_a_key(self, client: TestClient, model: Model) -> None:
        assert client.post(URL, json=EDIT).status_code == 401

    def test_create_requires_the_scope_edit(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model
    ) -> None:
        for scope in ("read", "apply"):
            assert client.post(URL, headers=keys[scope], json=EDIT).status_code == 403

    def test_create_writes_the_edit_its_job_and_an_audit_event(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        answer = client.post(URL, headers=keys["edit"], json=EDIT)
        assert answer.status_code == 202
        edit = answer.json()
        assert answer.headers["Location"] == f"/v1/edits/{edit['id']}"
        assert edit["model"] == "emoji"
        assert edit["state"] == "queued"
        assert edit["source"] == "US president"
        assert edit["destination"] == {"prompt": "Joe Biden"}
        assert edit["settings"]["optimization_steps"] == 20
        assert edit["settings"]["learning_rate"] == 0.2  # a default, kept as it was when the edit was asked for
        assert edit["created_by"].startswith("key:")
        assert client.get(answer.headers["Location"], headers=keys["read"]).json() == edit

        job = session.scalars(select(Job)).one()
        assert (str(job.target_id), job.kind, job.state) == (edit["id"], "optimize_edit", "queued")
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "edit.create")).one()
        assert event.target == f"edit:{edit['id']}"
        assert event.details["reason"] == EDIT["reason"]

    @pytest.mark.parametrize(("path", "body"), [("", EDIT), ("/batch", [EDIT, EDIT])], ids=["one", "batch"])
    def test_a_failed_audit_event_rolls_back_the_edit_and_its_job(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session, path: str, body: Any
    ) -> None:
        def count() -> list[int | None]:
            return [session.scalar(select(func.count()).select_from(table)) for table in (Edit, Job, AuditEvent)]

        refuse = "ALTER TABLE audit_events ADD CONSTRAINT refuse CHECK (action NOT LIKE 'edit.create%') NOT VALID"
        session.execute(text(refuse))  # the test's transaction takes it back
        before = count()
        assert client.post(URL + path, headers=keys["edit"], json=body).status_code == 500
        assert count() == before
        session.execute(text("ALTER TABLE audit_events DROP CONSTRAINT refuse"))
        assert client.post(URL + path, headers=keys["edit"], json=body).status_code == 202
        assert count() != before

    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"source": ""}, "/source"),
            ({"source": "   "}, "/source"),
            ({"source": "a\0b"}, "/source"),
            ({"source": "x" * 501}, "/source"),
            ({"source": 7}, "/source"),
            ({"templates": []}, "/templates"),
            ({"templates": ["an image of {}", "no placeholder"]}, "/templates/1"),
            ({"templates": ["{} and {}"]}, "/templates/0"),
            ({"templates": ["word " * 30 + "{}"]}, "/templates/0"),  # the subject is lost to truncation
            ({"templates": ["{}"] * 33}, "/templates"),
            ({"destination": {}}, "/destination"),
            ({"destination": {"prompt": "a", "erase": True}}, "/destination"),
            ({"destination": {"prompt": "a", "images": ["sha256:" + "0" * 64]}}, "/destination"),
            ({"destination": {"prompt": ""}}, "/destination/prompt"),
            ({"destination": {"prompt": "a\0"}}, "/destination/prompt"),
            ({"destination": {"prompt": "long " * 40}}, "/destination/prompt"),
            ({"destination": {"erase": False}}, "/destination/erase"),
            ({"destination": {"prompt": "a", "neutral": "art"}}, "/destination"),
            ({"destination": {"images": []}}, "/destination/images"),
            ({"destination": {"images": ["cat.png"]}}, "/destination/images/0"),
            ({"destination": {"images": ["sha256:" + "0" * 64]}}, "/destination/images/0"),
            ({"destination": {"balance": {"a": 1.0}}}, "/destination/balance"),
            ({"destination": {"balance": {"a": 0, "b": 0}}}, "/destination/balance"),
            ({"destination": {"balance": {"a": -1, "b": 1}}}, "/destination/balance/a"),
            ({"destination": {"picture": "a"}}, "/destination/picture"),
            ({"settings": {"optimization_steps": 0}}, "/settings/optimization_steps"),
            ({"settings": {"optimization_steps": 2001}}, "/settings/optimization_steps"),
            ({"settings": {"objective": "magic"}}, "/settings/objective"),
            ({"settings": {"preset": "magic"}}, "/settings/preset"),
            ({"settings": {"preset": ["published"]}}, "/settings/preset"),
            ({"settings": {"preset": "published", "optimization_steps": 0}}, "/settings/optimization_steps"),
            ({"settings": {"tolerance": -0.1}}, "/settings/tolerance"),
            ({"settings": {"text_optimizer": "sgd"}}, "/settings/text_optimizer"),
            ({"settings": {"layer": 4}}, "/settings/layer"),
            ({"settings": {"text_weight": 0, "warmup_steps": 0}}, "/settings/text_weight"),
            ({"settings": {"unknown": 1}}, "/settings/unknown"),
            ({"reason": "r" * 2001}, "/reason"),
            ({"labels": {"a": "v" * 257}}, "/labels/a"),
            ({"labels": {str(n): "" for n in range(33)}}, "/labels"),
            ({"labels": {"a": "\0"}}, "/labels/a"),
            ({"unknown": 1}, "/unknown"),
        ],
    )
    def test_an_invalid_field_is_rejected_with_its_pointer(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        model: Model,
        session: Session,
        fields: dict[str, Any],
        pointer: str,
    ) -> None:
        refused(client.post(URL, headers=keys["edit"], json=changed(**fields)), 422, pointer)
        assert session.scalar(select(func.count()).select_from(Edit)) == 0

    def test_an_unpaired_surrogate_is_rejected(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model
    ) -> None:
        for body in (
            b'{"source": "\\ud800", "destination": {"erase": true}}',
            b'{"source": "a", "destination": {"erase": true}, "labels": {"\\ud800": "x"}}',
        ):
            answer = client.post(URL, headers=keys["edit"] | {"Content-Type": "application/json"}, content=body)
            assert answer.status_code == 422
            assert json.loads(answer.content)["errors"]

    def test_a_preset_is_stored_as_its_settings(
        self, client: TestClient, create: Callable[..., dict[str, Any]]
    ) -> None:
        settings = create(settings={"preset": "published", "optimization_steps": 50, "seed": 3})["settings"]
        sampling = {"num_inference_steps": 20, "guidance_scale": 7.5}  # of the family
        assert settings == asdict(StageOneSettings.preset("published", optimization_steps=50, seed=3, **sampling))
        assert create()["settings"]["warmup_steps"] != settings["warmup_steps"] == 0
        described = client.get("/openapi.json").json()["components"]["schemas"]["StageOneSettings"]["properties"][
            "preset"
        ]
        assert '"warmup_steps": 0' in described["description"]

    @pytest.mark.parametrize("source", ["😀", "مرحبا", "e\u0301cole", "İstanbul"])
    def test_a_source_in_any_script_is_accepted(self, create: Callable[..., dict[str, Any]], source: str) -> None:
        assert create(source=source)["state"] == "queued"

    def test_equivalent_unicode_forms_are_one_source(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]]
    ) -> None:
        create(source="e\u0301cole")
        for twin in ("\u00e9cole", "e\u0301cole"):
            found = client.get("/v1/edits", headers=keys["read"], params={"source": twin}).json()["items"]
            assert [edit["source"] for edit in found] == ["\u00e9cole"]

    def test_each_kind_of_destination_is_accepted(self, create: Callable[..., dict[str, Any]]) -> None:
        assert create(destination={"erase": True})["destination"] == {"erase": True}
        assert create(destination={"erase": True, "neutral": "art"})["destination"] == {"erase": True, "neutral": "art"}
        balance = {"balance": {"female doctor": 0.5, "male doctor": 0.5}}
        assert create(destination=balance)["destination"] == balance

    def test_an_unknown_model_is_not_found(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        for name in ("nothing", "%00", "..%2f..%2fetc"):
            answer = client.post(f"/v1/models/{name}/edits", headers=keys["edit"], json=EDIT)
            assert answer.status_code == 404, name

    def test_a_model_that_is_not_ready_is_a_conflict(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model]
    ) -> None:
        add_model(name="fresh", state="registering")
        answer = client.post("/v1/models/fresh/edits", headers=keys["edit"], json=EDIT)
        assert answer.status_code == 409
        assert "registering" in answer.json()["detail"]


class TestListEdits:
    def test_filters_select_edits(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        create: Callable[..., dict[str, Any]],
        add_model: Callable[..., Model],
        session: Session,
    ) -> None:
        first = create(source="dog")
        second = create(source="cat")
        add_model(name="other")
        third = client.post("/v1/models/other/edits", headers=keys["admin"], json=changed(source="dog")).json()
        session.execute(update(Edit).where(Edit.id == second["id"]).values(state="failed"))

        def found(**filters: Any) -> Any:
            return [
                edit["id"] for edit in client.get("/v1/edits", headers=keys["read"], params=filters).json()["items"]
            ]

        assert found() == [third["id"], second["id"], first["id"]]
        assert found(model="emoji") == [second["id"], first["id"]]
        assert found(source="dog") == [third["id"], first["id"]]
        assert found(state="failed") == [second["id"]]
        assert found(created_by=third["created_by"]) == [third["id"]]
        assert found(model="emoji", source="dog") == [first["id"]]
        assert found(model="none") == []

    def test_pages_contain_each_edit_once(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]]
    ) -> None:
        ids = [create(source=f"dog {number}")["id"] for number in range(5)]
        url: str | None = "/v1/edits?limit=2&model=emoji"
        seen: list[str] = []
        while url:
            answer = client.get(url, headers=keys["read"])
            seen += [edit["id"] for edit in answer.json()["items"]]
            url = answer.links["next"]["url"] if "next" in answer.links else None
            assert (answer.json()["next"] is None) == (url is None)
        assert seen == ids[::-1]

    def test_invalid_filters_are_rejected(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        refused(client.get("/v1/edits?state=lost", headers=keys["read"]), 422, "state")
        refused(client.get("/v1/edits?limit=0", headers=keys["read"]), 422, "limit")
        refused(client.get("/v1/edits?source=%00", headers=keys["read"]), 422, "source")
        assert client.get("/v1/edits?unknown=1", headers=keys["read"]).status_code == 200


class TestGetEdit:
    def test_an_unknown_edit_is_not_found(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert client.get("/v1/edits/00000000-0000-7000-8000-000000000000", headers=keys["read"]).status_code == 404
        refused(client.get("/v1/edits/17", headers=keys["read"]), 422, "edit_id")

    def test_a_running_edit_has_its_progress(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]], session: Session
    ) -> None:
        edit = create()
        session.execute(
            update(Job).values(state="running", attempt=2, progress={"stage": "optimizing", "done": 5, "total": 20})
        )
        session.execute(update(Edit).values(state="optimizing"))
        session.commit()
        seen = client.get(f"/v1/edits/{edit['id']}", headers=keys["read"]).json()
        assert (seen["state"], seen["attempt"]) == ("optimizing", 2)
        assert (seen["progress"]["done"], seen["progress"]["total"]) == (5, 20)


class TestCancelEdit:
    def test_a_queued_edit_is_cancelled_at_once(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]], session: Session
    ) -> None:
        edit = create()
        for _ in range(2):
            answer = client.post(f"/v1/edits/{edit['id']}/cancel", headers=keys["edit"])
            assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
        assert session.scalars(select(Job.state)).one() == "cancelled"
        actions = session.scalars(select(AuditEvent.action).where(AuditEvent.target == f"edit:{edit['id']}")).all()
        assert actions == ["edit.create", "edit.cancel"]

    def test_cancel_requests_the_end_of_a_running_edit(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]], session: Session
    ) -> None:
        edit = create()
        session.execute(update(Job).values(state="running", attempt=1))
        session.execute(update(Edit).values(state="optimizing"))
        session.commit()
        answer = client.post(f"/v1/edits/{edit['id']}/cancel", headers=keys["edit"])
        assert answer.json()["state"] == "cancelling"
        assert session.execute(select(Job.state, Job.cancel_requested)).one() == ("running", True)

    @pytest.mark.parametrize("state", ["ready", "failed"])
    def test_a_finished_edit_cannot_be_cancelled(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        create: Callable[..., dict[str, Any]],
        session: Session,
        state: str,
    ) -> None:
        edit = create()
        session.execute(update(Edit).values(state=state))
        session.commit()
        answer = client.post(f"/v1/edits/{edit['id']}/cancel", headers=keys["edit"])
        assert answer.status_code == 409
        assert state in answer.json()["detail"]

    def test_an_unknown_edit_is_not_found(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        url = "/v1/edits/00000000-0000-7000-8000-000000000000"
        assert client.post(f"{url}/cancel", headers=keys["edit"]).status_code == 404
        assert client.post(f"{url}/retry", headers=keys["edit"]).status_code == 404


class TestRetryEdit:
    def test_a_failed_edit_is_queued_again(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]], session: Session
    ) -> None:
        edit = create()
        problem = {"title": "Worker lost", "detail": "…", "errors": []}
        session.execute(update(Job).values(state="failed", attempt=5))
        session.execute(update(Edit).values(state="failed", problem=problem))
        session.commit()
        answer = client.post(f"/v1/edits/{edit['id']}/retry", headers=keys["edit"])
        assert answer.status_code == 202
        assert (answer.json()["state"], answer.json()["problem"], answer.json()["attempt"]) == ("queued", None, 0)
        assert session.scalars(select(Job.state).order_by(Job.id)).all() == ["failed", "queued"]

    def test_a_cancelled_edit_is_queued_again(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]]
    ) -> None:
        edit = create()
        client.post(f"/v1/edits/{edit['id']}/cancel", headers=keys["edit"])
        assert client.post(f"/v1/edits/{edit['id']}/retry", headers=keys["edit"]).json()["state"] == "queued"

    def test_a_queued_edit_cannot_be_retried(
        self, client: TestClient, keys: Mapping[str, Headers], create: Callable[..., dict[str, Any]]
    ) -> None:
        assert client.post(f"/v1/edits/{create()['id']}/retry", headers=keys["edit"]).status_code == 409
