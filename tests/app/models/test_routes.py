from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Job, Model, Statistics
from app.settings import Settings
from app.storage.local import LocalStore
from tests.app.conftest import Headers


@pytest.fixture
def root(settings: Settings, tmp_path: Path) -> Path:
    """A model root with one folder and one caption list."""
    root = tmp_path / "root"
    (root / "tiny").mkdir(parents=True)
    (root / "captions.txt").write_text("a red dog\n\n  a   blue\tcat \na bird\n")
    settings.model_roots = (root,)
    return root


class TestRegisterModel:
    def test_scopes(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        body = {"name": "m", "source": "a/b"}
        assert client.post("/v1/models", json=body).status_code == 401
        for scope in ("read", "edit", "apply"):
            assert client.post("/v1/models", headers=keys[scope], json=body).status_code == 403

    def test_hub_id(self, client: TestClient, keys: Mapping[str, Headers], session: Session) -> None:
        body: dict[str, Any] = {
            "name": "turbo",
            "source": "stabilityai/sd-turbo",
            "revision": "main",
            "namespace": "acme",
        }
        body["classifier"] = "google/vit-base-patch16-224"
        body["license"] = {"id": "other", "name": "sai-nc-community", "link": "https://stability.ai/license"}
        answer = client.post("/v1/models", headers=keys["admin"], json=body)
        assert answer.status_code == 202
        assert answer.headers["Location"] == "/v1/models/turbo"
        model = answer.json()
        assert (model["state"], model["namespace"], model["revision"]) == ("registering", "acme", "main")
        assert model["classifier"] == "google/vit-base-patch16-224"
        assert model["license"] == body["license"]
        assert client.get("/v1/models/turbo", headers=keys["read"]).json() == model
        job = session.scalars(select(Job)).one()
        assert (job.kind, str(job.target_id)) == ("register_model", model["id"])
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "model.register")).one()
        assert event.details == {key: value for key, value in body.items() if key != "name"}

    def test_null_is_the_same_as_nothing(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        body = {"name": "m", "source": "a/b", "revision": None, "namespace": None, "classifier": None}
        answer = client.post("/v1/models", headers=keys["admin"], json=body)
        assert answer.status_code == 202, answer.text

    def test_folder(self, client: TestClient, keys: Mapping[str, Headers], root: Path) -> None:
        answer = client.post("/v1/models", headers=keys["admin"], json={"name": "tiny", "source": "tiny"})
        assert (answer.status_code, answer.json()["namespace"]) == (202, "emender")
        answer = client.post("/v1/models", headers=keys["admin"], json={"name": "other", "source": "absent"})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == "/source"
        assert str(root) not in answer.text

    @pytest.mark.parametrize(
        ("body", "pointer"),
        [
            ({"name": "m", "source": "a/b", "license": "mit"}, "/license"),
            ({"name": "m", "source": "a/b", "license": {}}, "/license/id"),
            ({"name": "m", "source": "a/b", "license": {"id": "My License"}}, "/license/id"),
            ({"name": "m", "source": "a/b", "license": {"id": "other", "name": "x\0"}}, "/license/name"),
            *[
                ({"name": name, "source": "a/b"}, "/name")
                for name in (
                    "",
                    "a/b",
                    "a b",
                    "a--b",
                    "a..b",
                    ".a",
                    "a.",
                    "-a",
                    "a.git",
                    "x" * 97,
                    "é",
                    "a\0",
                    "api",
                    "V1",
                )
            ],
            *[
                ({"name": "m", "source": source}, "/source")
                for source in ("", "a/b/c", "/etc", "..", "../a", "a/..", "a\\b", "https://x.y/z", "a\0", "a/")
            ],
            ({"name": "m", "source": "a/b", "namespace": "docs"}, "/namespace"),
            ({"name": "m", "source": "a/b", "revision": "../x"}, "/revision"),
            ({"name": "m", "source": "folder", "revision": "main"}, ""),
            ({"name": "m", "source": "a/b", "classifier": "../x"}, "/classifier"),
            ({"name": "m"}, "/source"),
        ],
    )
    def test_rejected(self, client: TestClient, keys: Mapping[str, Headers], body: Any, pointer: Any) -> None:
        answer = client.post("/v1/models", headers=keys["admin"], json=body)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == pointer

    def test_name_taken(self, client: TestClient, keys: Mapping[str, Headers], model: Model) -> None:
        answer = client.post("/v1/models", headers=keys["admin"], json={"name": "emoji", "source": "a/b"})
        assert answer.status_code == 409

    def test_failed_one_may_be_registered_again(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model], session: Session
    ) -> None:
        before = add_model(state="failed", problem={"title": "Unsafe pipeline", "detail": "…", "errors": []})
        answer = client.post("/v1/models", headers=keys["admin"], json={"name": "emoji", "source": "a/b"})
        assert answer.status_code == 202
        assert (answer.json()["id"], answer.json()["state"]) == (str(before.id), "registering")
        assert answer.json()["problem"] is None
        assert session.scalars(select(Job.target_id)).one() == before.id


class TestDeleteModel:
    def test_failed_one_is_deleted(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model], session: Session
    ) -> None:
        add_model(state="failed", problem={"title": "Unsafe pipeline", "detail": "…", "errors": []})
        assert client.delete("/v1/models/emoji", headers=keys["admin"]).status_code == 204
        assert client.get("/v1/models/emoji", headers=keys["read"]).status_code == 404
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "model.delete")).one()
        assert (event.target, event.details["title"]) == ("model:emoji", "Unsafe pipeline")

    @pytest.mark.parametrize("state", ["registering", "ready"])
    def test_others_stay(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model], state: str
    ) -> None:
        add_model(state=state)
        answer = client.delete("/v1/models/emoji", headers=keys["admin"])
        assert (
            answer.status_code == 409 and f"is {state}; only one whose registration failed" in answer.json()["detail"]
        )
        assert client.get("/v1/models/emoji", headers=keys["read"]).status_code == 200

    def test_scope(self, client: TestClient, keys: Mapping[str, Headers], model: Model) -> None:
        assert client.delete("/v1/models/emoji", headers=keys["edit"]).status_code == 403
        assert client.delete("/v1/models/nothing", headers=keys["admin"]).status_code == 404


class TestGetModel:
    def test_ready(self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session) -> None:
        session.add_all(
            [
                Statistics(model_id=model.id, state="ready", captions_name="a", digest="a" * 64, created_by="test"),
                Statistics(model_id=model.id, state="failed", captions_name="b", created_by="test"),
            ]
        )
        session.commit()
        seen = client.get("/v1/models/emoji", headers=keys["read"]).json()
        assert (seen["state"], seen["family"], seen["digest"]) == ("ready", "sd1", "d" * 64)
        assert seen["encoders"] == [{"name": "text_encoder", "layers": 4, "width": 64, "mlp_width": 256}]
        assert (seen["statistics"]["state"], seen["statistics"]["captions_name"]) == ("ready", "a")

    def test_failed_shows_the_problem(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model]
    ) -> None:
        problem = {"title": "Unsafe pipeline", "detail": "pickles", "errors": [{"pointer": "/source", "detail": "p"}]}
        add_model(state="failed", problem=problem)
        assert client.get("/v1/models/emoji", headers=keys["read"]).json()["problem"] == problem

    def test_progress(self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session) -> None:
        session.add(
            Job(
                kind="register_model",
                target_id=model.id,
                state="running",
                progress={"stage": "storing", "done": 3, "total": 9},
            )
        )
        session.commit()
        assert client.get("/v1/models/emoji", headers=keys["read"]).json()["progress"]["done"] == 3

    @pytest.mark.parametrize("name", ["nothing", "%00", "..", "%2e%2e%2fetc"])
    def test_unknown(self, client: TestClient, keys: Mapping[str, Headers], name: str) -> None:
        assert client.get(f"/v1/models/{name}", headers=keys["read"]).status_code == 404

    def test_list(self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model]) -> None:
        for name in ("a", "b", "c"):
            add_model(name=name)
        first = client.get("/v1/models?limit=2", headers=keys["read"])
        assert [model["name"] for model in first.json()["items"]] == ["c", "b"]
        second = client.get(first.links["next"]["url"], headers=keys["read"])
        assert [model["name"] for model in second.json()["items"]] == ["a"]


class TestCreateStatistics:
    url = "/v1/models/emoji/statistics"

    @pytest.mark.parametrize(
        ("captions", "pointer"),
        [(["a dog", 1], "/captions/1"), (["a dog", ""], "/captions/1"), ([], "/captions"), ("no name!", "/captions")],
    )
    def test_error_points_at_the_caption(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, captions: object, pointer: str
    ) -> None:
        answer = client.post(self.url, headers=keys["admin"], json={"captions": captions})
        assert answer.status_code == 422
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]

    def test_list_of_captions(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session, store: LocalStore
    ) -> None:
        body = {"captions": ["a dog", "  ", "a\ncat", "a bird"], "samples": 2}
        answer = client.post(self.url, headers=keys["admin"], json=body)
        assert answer.status_code == 202
        made = answer.json()
        assert (made["state"], made["captions"], made["captions_name"]) == ("queued", 2, "uploaded")
        assert store.read(made["captions_sha256"]) == b"a dog\na cat\n"
        assert client.get(answer.headers["Location"], headers=keys["read"]).json() == made
        listed = client.get(self.url, headers=keys["read"]).json()["items"]
        assert listed == [made]
        job = session.scalars(select(Job)).one()
        assert (job.kind, str(job.target_id)) == ("estimate_statistics", made["id"])

    def test_named_list(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, root: Path, store: LocalStore
    ) -> None:
        answer = client.post(self.url, headers=keys["admin"], json={"captions": "captions"})
        assert answer.json()["captions_name"] == "captions"
        assert store.read(answer.json()["captions_sha256"]) == b"a red dog\na blue cat\na bird\n"

    @pytest.mark.parametrize(
        "captions", ["absent", "../captions", "captions.txt/..", "", [], ["   "], ["a\0"], [""], 7]
    )
    def test_rejected(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, root: Path, captions: Any
    ) -> None:
        answer = client.post(self.url, headers=keys["admin"], json={"captions": captions})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"].startswith("/captions")

    def test_model_not_ready(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model]
    ) -> None:
        add_model(state="registering")
        assert client.post(self.url, headers=keys["admin"], json={"captions": ["a"]}).status_code == 409

    def test_one_at_a_time(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        assert client.post(self.url, headers=keys["admin"], json={"captions": ["a"]}).status_code == 202
        assert client.post(self.url, headers=keys["admin"], json={"captions": ["a"]}).status_code == 409
        session.execute(update(Statistics).values(state="failed"))
        session.commit()
        assert client.post(self.url, headers=keys["admin"], json={"captions": ["a"]}).status_code == 202

    def test_of_another_model(
        self, client: TestClient, keys: Mapping[str, Headers], add_model: Callable[..., Model], model: Model
    ) -> None:
        add_model(name="other")
        made = client.post(self.url, headers=keys["admin"], json={"captions": ["a"]}).json()
        assert client.get(f"/v1/models/other/statistics/{made['id']}", headers=keys["read"]).status_code == 404

    def test_scope(self, client: TestClient, keys: Mapping[str, Headers], model: Model) -> None:
        assert client.post(self.url, headers=keys["apply"], json={"captions": ["a"]}).status_code == 403
