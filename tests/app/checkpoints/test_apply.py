"""POST /v1/models/{model}/apply: what it refuses, and what it would do."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Checkpoint, Edit, Job, Model
from tests.app.checkpoints.conftest import Service
from tests.app.conftest import Headers

URL = "/v1/models/emoji/apply"


def pointers(answer: Any) -> Any:
    assert answer.status_code == 422, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    return [error["pointer"] for error in answer.json()["errors"]]


@pytest.mark.usefixtures("model")
class TestRefused:
    def test_anonymous_and_other_scopes(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert client.post(URL, json={"edits": "ready"}).status_code == 401
        for scope in ("read", "edit"):
            assert client.post(URL, json={"edits": "ready"}, headers=keys[scope]).status_code == 403

    def test_unknown_model(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        answer = client.post("/v1/models/nobody/apply", json={"edits": "ready"}, headers=keys["apply"])
        assert answer.status_code == 404
        assert answer.json()["title"] == "Model not found"

    @pytest.mark.parametrize("alpha", [0, 1, -0.5, 2, "half", None])
    def test_alpha_outside_its_interval(
        self, client: TestClient, keys: Mapping[str, Headers], alpha: float | int | str | None
    ) -> None:
        answer = client.post(URL, json={"edits": "ready", "alpha": alpha}, headers=keys["apply"])
        assert pointers(answer) == ["/alpha"]

    @pytest.mark.parametrize("edits", [[], "all", 5, [5], None, {}])
    def test_edits_that_are_no_selection(self, client: TestClient, keys: Mapping[str, Headers], edits: Any) -> None:
        assert pointers(client.post(URL, json={"edits": edits}, headers=keys["apply"])) == ["/edits"]

    @pytest.mark.parametrize("body", [{}, {"edits": "ready", "from": "v1"}])
    def test_exactly_one_of_edits_and_from(
        self, client: TestClient, keys: Mapping[str, Headers], body: dict[str, Any]
    ) -> None:
        assert pointers(client.post(URL, json=body, headers=keys["apply"])) == ["/edits"]

    def test_add_without_from(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert pointers(client.post(URL, json={"edits": "ready", "add": ["x"]}, headers=keys["apply"])) == ["/add"]

    def test_from_an_unknown_version(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert pointers(client.post(URL, json={"from": "v7"}, headers=keys["apply"])) == ["/from"]

    def test_unknown_field(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert pointers(client.post(URL, json={"edits": "ready", "aplha": 0.4}, headers=keys["apply"])) == ["/aplha"]

    @pytest.mark.parametrize("alias", ["main", "base", "v3", "a/b", "../x", "a..b", "0" * 40, "x.git"])
    def test_alias_that_means_something_else(self, client: TestClient, keys: Mapping[str, Headers], alias: str) -> None:
        assert pointers(client.post(URL, json={"edits": "ready", "alias": alias}, headers=keys["apply"])) == ["/alias"]

    def test_nul_in_notes(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert pointers(client.post(URL, json={"edits": "ready", "notes": "a\0"}, headers=keys["apply"])) == ["/notes"]

    def test_no_edit_is_ready(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        add_edit("fox", state="queued")
        assert pointers(client.post(URL, json={"edits": "ready"}, headers=keys["apply"])) == ["/edits"]

    def test_each_bad_edit_is_named(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        add_edit: Callable[..., Edit],
        add_model: Callable[..., Model],
    ) -> None:
        fine, other = add_edit("fox"), add_edit("owl", model=add_model("another"))
        running, cancelled = add_edit("jay", state="optimizing"), add_edit("elk", state="cancelled")
        unknown = "019376f0-6f3c-7a10-8e25-3d2f6a1b9c04"
        ids = [str(fine.id), str(other.id), str(running.id), str(cancelled.id), str(fine.id), unknown, "fox"]
        answer = client.post(URL, json={"edits": ids}, headers=keys["apply"])
        assert pointers(answer) == [f"/edits/{i}" for i in range(1, 7)]
        details = [error["detail"] for error in answer.json()["errors"]]
        for detail, word in zip(
            details, ["another model", "optimizing", "cancelled", "twice", "no edit", "no edit"], strict=True
        ):
            assert word in detail

    def test_without_statistics(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], session: Session
    ) -> None:
        add_edit("fox")
        answer = client.post(URL, json={"edits": "ready"}, headers=keys["apply"])
        assert answer.status_code == 409
        assert "POST /v1/models/emoji/statistics" in answer.json()["detail"]
        assert session.scalars(select(Checkpoint)).all() == []

    def test_model_that_is_not_ready(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model]
    ) -> None:
        add_model("young", state="registering")
        answer = client.post("/v1/models/young/apply", json={"edits": "ready"}, headers=keys["apply"])
        assert answer.status_code == 409

    @pytest.mark.usefixtures("statistics")
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ([2, 9], ["/layers/1"]),
            ([-1, 2], ["/layers/0"]),
            ([2, 2], ["/layers/1"]),
            ([0, 1], ["/layers"]),
            ([], ["/layers"]),
        ],
    )
    def test_layers(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], layers: Any, expected: Any
    ) -> None:
        add_edit("fox")
        assert pointers(client.post(URL, json={"edits": "ready", "layers": layers}, headers=keys["apply"])) == expected

    @pytest.mark.usefixtures("statistics")
    def test_preserved_prompts(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        add_edit("fox")
        body = {"edits": "ready", "preserve": ["a red owl", "x" * 100, " "]}
        answer = client.post(URL, json=body, headers=keys["apply"])
        assert pointers(answer) == ["/preserve/1", "/preserve/2"]
        assert "truncation" in answer.json()["errors"][0]["detail"]

    @pytest.mark.usefixtures("statistics")
    def test_more_edits_than_can_be_written_in_many_contexts(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        add_edit: Callable[..., Edit],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("app.checkpoints.apply.MAX_EDITS_IN_CONTEXTS", 1)
        body = {"edits": [str(add_edit("fox").id)], "contexts": "many", "dry_run": True}
        assert client.post(URL, json=body, headers=keys["apply"]).status_code == 200
        add_edit("owl")
        body["edits"] = "ready"
        assert pointers(client.post(URL, json=body, headers=keys["apply"])) == ["/contexts"]
        assert client.post(URL, json=body | {"contexts": "own"}, headers=keys["apply"]).status_code == 200

    @pytest.mark.usefixtures("statistics")
    def test_values_of_different_layers(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        ids = [str(add_edit("fox").id), str(add_edit("owl", layer=1).id)]
        assert pointers(client.post(URL, json={"edits": ids}, headers=keys["apply"])) == ["/edits/1"]


@pytest.mark.usefixtures("model", "statistics")
class TestApplied:
    def test_accepted(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], session: Session
    ) -> None:
        later, earlier = [add_edit("fox"), add_edit("owl")][::-1]
        body = {"edits": [str(later.id), str(earlier.id)], "notes": "weekly", "alias": "staging"}
        answer = client.post(URL, json=body, headers=keys["apply"])
        assert answer.status_code == 202
        assert answer.headers["Location"] == "/v1/models/emoji/checkpoints/v1"
        made = answer.json()
        assert (made["version"], made["state"], made["commit"], made["files"]) == ("v1", "building", None, [])
        assert [edit["id"] for edit in made["edits"]] == [str(earlier.id), str(later.id)]  # in order of creation
        assert made["layers"] == [0, 1, 2]
        assert made["alias"] == {
            "name": "staging",
            "moved": False,
            "detail": "It is moved when the checkpoint is published.",
        }
        checkpoint = session.scalars(select(Checkpoint)).one()
        assert session.scalars(select(Job).where(Job.target_id == checkpoint.id)).one().kind == "build_checkpoint"
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "checkpoint.apply")).one()
        assert event.target == "checkpoint:emoji/v1"
        assert event.details["edits"] == [str(earlier.id), str(later.id)]

    def test_a_preset_and_what_comes_before_it(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        add_edit("owl")
        body = {"edits": "ready", "preset": "published", "alpha": 0.6}
        made = client.post(URL, json=body, headers=keys["apply"]).json()
        assert (made["residual_schedule"], made["moment_weight"], made["alpha"]) == ("published", 4000.0, 0.6)
        assert pointers(client.post(URL, json=body | {"preset": "magic"}, headers=keys["apply"])) == ["/preset"]

    def test_repeated_under_one_idempotency_key(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], session: Session
    ) -> None:
        add_edit("fox")
        headers = {**keys["apply"], "Idempotency-Key": "once"}
        first, second = (client.post(URL, json={"edits": "ready"}, headers=headers) for _ in range(2))
        assert first.json() == second.json()
        assert second.headers["Location"] == first.headers["Location"]
        assert len(session.scalars(select(Checkpoint)).all()) == 1

    def test_ready_takes_the_newest_of_each_source(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        old, other, new = add_edit("Fox"), add_edit("owl"), add_edit(" fox ")
        add_edit("fox", state="failed")
        answer = client.post(URL, json={"edits": "ready", "dry_run": True}, headers=keys["apply"])
        assert answer.status_code == 200
        plan = answer.json()
        assert [edit["id"] for edit in plan["edits"]] == [str(other.id), str(new.id)]
        assert plan["superseded"] == [str(old.id)]

    def test_dry_run_names_conflicts_and_creates_nothing(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], session: Session
    ) -> None:
        first, second = add_edit("fox"), add_edit("fox")
        circle = add_edit("not fox", destination={"prompt": "elk"})
        ids = [str(edit.id) for edit in (first, second, circle)]
        answer = client.post(URL, json={"edits": ids, "dry_run": True}, headers=keys["apply"])
        assert answer.status_code == 200
        found = [(conflict["kind"], conflict["edits"]) for conflict in answer.json()["conflicts"]]
        assert ("same source", [ids[0], ids[1]]) in found
        assert ("source is a destination", [ids[2], ids[0]]) in found
        assert session.scalars(select(Checkpoint)).all() == []
        assert session.scalars(select(Job)).all() == []

    def test_from_a_version(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        fox, owl = add_edit("fox"), add_edit("owl")
        client.post(URL, json={"edits": "ready"}, headers=keys["apply"])
        newer, elk = add_edit("Fox"), add_edit("elk")
        body = {"from": "v1", "remove": [str(owl.id)], "add": [str(newer.id), str(elk.id)]}
        made = client.post(URL, json=body, headers=keys["apply"]).json()
        assert (made["version"], made["parent"]) == ("v2", "v1")
        assert [edit["id"] for edit in made["edits"]] == [str(newer.id), str(elk.id)]
        for remove, expected in (([str(elk.id)], ["/remove/0"]), ([str(fox.id), str(owl.id)], ["/remove"])):
            body = {"from": "v1", "remove": remove}
            assert pointers(client.post(URL, json=body, headers=keys["apply"])) == expected


class TestConcurrency:
    def test_versions_are_distinct_and_growing(self, service: Service) -> None:
        """Eight applies at once: v1 … v8, each once."""
        edit = str(service.edit("fox"))

        def apply(_: int) -> str:
            answer = service.client.post("/v1/models/tiny/apply", json={"edits": [edit]}, headers=service.keys["apply"])
            assert answer.status_code == 202, answer.text
            return str(answer.json()["version"])

        with ThreadPoolExecutor(8) as pool:
            versions = list(pool.map(apply, range(8)))
        assert sorted(versions) == [f"v{number}" for number in range(1, 9)]
