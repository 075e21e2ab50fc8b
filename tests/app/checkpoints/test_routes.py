"""Read versions and their files, retract them, move aliases, trace files."""

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app.checkpoints.files import store_content
from app.db.models import Checkpoint, Edit, Model, Statistics
from app.storage.local import LocalStore
from tests.app.checkpoints.conftest import Service, add_version
from tests.app.conftest import Headers

URL = "/v1/models/emoji/checkpoints"
ALIASES = "/v1/models/emoji/aliases"
CONTENT = bytes(range(256)) * 40
PATH = "text_encoder/model.safetensors"


@pytest.fixture
def add_checkpoint(
    session: Session, model: Model, statistics: Statistics, store: LocalStore, add_edit: Callable[..., Edit]
) -> Callable[..., Checkpoint]:
    """Add a version with one file, published unless said otherwise."""

    def add(number: Any, *, state: str = "published", content: Any = CONTENT, edits: Any = ()) -> Any:
        files = [store_content(store, PATH, content)] if state == "published" else []
        edits = edits or [add_edit(f"fox {number}")]
        return add_version(session, model, statistics, number, edits=edits, state=state, files=files)

    return add


class TestReadCheckpoints:
    def test_anonymous(self, client: TestClient) -> None:
        assert client.get(URL).status_code == 401

    def test_pages_newest_first(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        for number in (1, 2, 3):
            add_checkpoint(number)
        first = client.get(URL, params={"limit": 2}, headers=keys["read"])
        assert [item["version"] for item in first.json()["items"]] == ["v3", "v2"]
        second = client.get(first.links["next"]["url"], headers=keys["read"])
        assert [item["version"] for item in second.json()["items"]] == ["v1"]
        assert second.json()["next"] is None

    def test_by_version_and_alias(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1)
        client.put(f"{ALIASES}/production", json={"version": "v1"}, headers=keys["apply"])
        by_version, by_alias = (client.get(f"{URL}/{name}", headers=keys["read"]) for name in ("v1", "production"))
        assert by_version.json() == by_alias.json()
        assert by_version.json()["aliases"] == ["production"]

    @pytest.mark.parametrize("name", ["v2", "v0", "nobody"])
    def test_unknown(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint], name: str
    ) -> None:
        add_checkpoint(1)
        assert client.get(f"{URL}/{name}", headers=keys["read"]).status_code == 404

    @pytest.mark.parametrize("name", ["v1%00", "%2e%2e", "v1%20"])
    def test_odd_names(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint], name: str
    ) -> None:
        add_checkpoint(1)
        assert client.get(f"{URL}/{name}", headers=keys["read"]).status_code in (404, 422)


class TestReadFile:
    url = f"{URL}/v1/files/{PATH}"

    def test_whole_and_head(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        checkpoint = add_checkpoint(1)
        whole = client.get(self.url, headers=keys["read"])
        assert (whole.status_code, whole.content) == (200, CONTENT)
        assert re.fullmatch(r'"[0-9a-f]{64}"', whole.headers["ETag"])
        assert whole.headers["X-Repo-Commit"] == checkpoint.commit
        head = client.head(self.url, headers=keys["read"])
        assert (head.status_code, head.content) == (200, b"")
        for name in ("ETag", "Content-Length", "Accept-Ranges", "X-Repo-Commit"):
            assert head.headers[name] == whole.headers[name]
        assert head.headers["Content-Length"] == str(len(CONTENT))

    @pytest.mark.parametrize(
        ("range_", "first", "last"),
        [
            ("bytes=0-9", 0, 9),
            ("bytes=10230-", 10230, 10239),
            ("bytes=-5", 10235, 10239),
            ("bytes=10230-99999", 10230, 10239),
        ],
    )
    def test_range(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        add_checkpoint: Callable[..., Checkpoint],
        range_: str,
        first: int,
        last: int,
    ) -> None:
        add_checkpoint(1)
        part = client.get(self.url, headers={**keys["read"], "Range": range_})
        assert (part.status_code, part.content) == (206, CONTENT[first : last + 1])
        assert part.headers["Content-Range"] == f"bytes {first}-{last}/{len(CONTENT)}"

    @pytest.mark.parametrize("range_", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
    def test_range_outside(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint], range_: str
    ) -> None:
        add_checkpoint(1)
        answer = client.get(self.url, headers={**keys["read"], "Range": range_})
        assert answer.status_code == 416
        assert answer.headers["Content-Range"] == f"bytes */{len(CONTENT)}"
        assert answer.headers["Content-Type"] == "application/problem+json"

    @pytest.mark.parametrize("range_", ["bytes=9-3", "lines=1-2", "bytes=a-b", "bytes=0-1,4-5", "bytes", "bytes=-"])
    def test_range_that_is_not_honoured(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint], range_: str
    ) -> None:
        add_checkpoint(1)
        answer = client.get(self.url, headers={**keys["read"], "Range": range_})
        assert (answer.status_code, answer.content) == (200, CONTENT)

    def test_conditional(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1)
        tag = client.head(self.url, headers=keys["read"]).headers["ETag"]
        for sent in (tag, f'"other", {tag}', "*", f"W/{tag}"):
            answer = client.get(self.url, headers={**keys["read"], "If-None-Match": sent})
            assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", tag)
        assert client.get(self.url, headers={**keys["read"], "If-None-Match": '"other"'}).status_code == 200
        resumed = {**keys["read"], "Range": "bytes=5-"}
        assert client.get(self.url, headers={**resumed, "If-Range": tag}).status_code == 206
        assert client.get(self.url, headers={**resumed, "If-Range": '"other"'}).status_code == 200

    @pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
    @pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-9"}])
    def test_damaged_blob_is_never_sent(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        add_checkpoint: Callable[..., Checkpoint],
        store: LocalStore,
        damage: str,
        headers: dict[str, Any],
    ) -> None:
        sha256 = add_checkpoint(1).files[0].sha256
        blob = store.path(sha256)
        if damage == "flipped":
            blob.write_bytes(CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:])
        elif damage == "cut":
            blob.write_bytes(CONTENT[:-1])
        else:
            blob.unlink()
        answer = client.get(self.url, headers={**keys["read"], **headers})
        assert answer.status_code == 500
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["title"] == "File unreadable"

    @pytest.mark.parametrize(
        "path",
        [
            "nothing.bin",
            "../../../etc/passwd",
            "%2e%2e/%2e%2e/etc/passwd",
            "%252e%252e/x",
            "/etc/passwd",
            "a%00b",
            "..\\x",
            "",
        ],
    )
    def test_no_such_path(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint], path: str
    ) -> None:
        add_checkpoint(1)
        answer = client.get(f"{URL}/v1/files/{path}", headers=keys["read"])
        assert answer.status_code == 404
        assert b"root:" not in answer.content

    def test_not_published(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1, state="building")
        assert client.get(self.url, headers=keys["read"]).status_code == 409


class TestRetract:
    def test_no_longer_served_and_on_record(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1)
        client.put(f"{ALIASES}/production", json={"version": "v1"}, headers=keys["apply"])
        body = {"reason": "draws the wrong flag"}
        assert client.post(f"{URL}/v1/retract", json=body, headers=keys["apply"]).status_code == 403
        answer = client.post(f"{URL}/v1/retract", json=body, headers=keys["admin"])
        assert (answer.status_code, answer.json()["state"]) == (200, "retracted")
        for name in ("v1", "production"):
            gone = client.get(f"{URL}/{name}/files/{PATH}", headers=keys["read"])
            assert gone.status_code == 410
            assert "draws the wrong flag" in gone.json()["detail"]
        assert client.get(f"{URL}/v1", headers=keys["read"]).json()["problem"]["detail"] == "draws the wrong flag"
        assert client.post(f"{URL}/v1/retract", json=body, headers=keys["admin"]).status_code == 410
        other = client.put(f"{ALIASES}/staging", json={"version": "v1"}, headers=keys["apply"])
        assert other.status_code == 410

    def test_needs_a_reason(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1)
        answer = client.post(f"{URL}/v1/retract", json={"reason": ""}, headers=keys["admin"])
        assert [error["pointer"] for error in answer.json()["errors"]] == ["/reason"]


class TestAliases:
    url = f"{ALIASES}/production"

    def test_create_move_roll_back_delete(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1)
        add_checkpoint(2)
        apply = keys["apply"]
        created = client.put(self.url, json={"version": "v1"}, headers={**apply, "If-None-Match": "*"})
        assert created.status_code == 201
        tag = created.headers["ETag"]
        moved = client.put(self.url, json={"version": "v2"}, headers={**apply, "If-Match": tag})
        assert (moved.status_code, moved.json()["version"]) == (200, "v2")
        lost = client.put(self.url, json={"version": "v1"}, headers={**apply, "If-Match": tag})
        assert lost.status_code == 412
        assert lost.headers["ETag"] == moved.headers["ETag"]
        back = client.put(self.url, json={"version": "v1"}, headers={**apply, "If-Match": moved.headers["ETag"]})
        assert client.get(self.url, headers=keys["read"]).json()["version"] == "v1"
        assert client.delete(self.url, headers={**apply, "If-Match": tag}).status_code == 412
        assert client.delete(self.url, headers={**apply, "If-Match": back.headers["ETag"]}).status_code == 204
        assert client.get(self.url, headers=keys["read"]).status_code == 404
        again = client.put(self.url, json={"version": "v1"}, headers=apply)
        tags = [created.headers["ETag"], moved.headers["ETag"], back.headers["ETag"], again.headers["ETag"]]
        assert len(set(tags)) == 4  # also across the deletion

    def test_preconditions(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1)
        apply = keys["apply"]
        assert client.put(self.url, json={"version": "v1"}, headers={**apply, "If-Match": '"1"'}).status_code == 412
        assert client.put(self.url, json={"version": "v1"}, headers=apply).status_code == 201
        unconditional = client.put(self.url, json={"version": "v1"}, headers=apply)
        assert unconditional.status_code == 428
        assert unconditional.headers["ETag"] == '"1"'
        exists = client.put(self.url, json={"version": "v1"}, headers={**apply, "If-None-Match": "*"})
        assert exists.status_code == 412
        assert client.put(self.url, json={"version": "v1"}, headers={**apply, "If-Match": "*"}).status_code == 200
        assert client.delete(self.url, headers=apply).status_code == 428

    def test_bad_versions_and_names(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1, state="building")
        apply = keys["apply"]
        assert client.put(self.url, json={"version": "v1"}, headers=apply).status_code == 409
        unknown = client.put(self.url, json={"version": "v9"}, headers=apply)
        assert [error["pointer"] for error in unknown.json()["errors"]] == ["/version"]
        assert client.put(f"{ALIASES}/main", json={"version": "v1"}, headers=apply).status_code == 422
        assert client.put(self.url, json={"version": "v1"}, headers=keys["read"]).status_code == 403

    def test_race_has_one_winner(self, service: Service) -> None:
        """Eight who all read the same ETag: one moves the alias, seven are told."""
        service.edit("fox")
        service.apply(edits="ready", alias="production")
        service.apply(edits="ready")
        url = "/v1/models/tiny/aliases/production"
        tag = service.client.get(url, headers=service.keys["read"]).headers["ETag"]

        def move(_: int) -> int:
            headers = {**service.keys["apply"], "If-Match": tag}
            return service.client.put(url, json={"version": "v2"}, headers=headers).status_code

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(move, range(8))) == [200] + [412] * 7


class TestDifference:
    def test_between_versions_and_against_the_base(self, service: Service) -> None:
        ids = [str(service.edit(source)) for source in ("fox", "owl")]
        service.apply(edits=ids[:1])
        service.apply(edits=ids, layers=[1, 2])
        between = service.get("/v1/models/tiny/checkpoints/v2/difference?against=v1")
        assert [edit["id"] for edit in between["added"]] == ids[1:]
        assert between["removed"] == []
        assert [layer["layer"] for layer in between["layers"]] == [0, 1, 2]
        assert {file["path"] for file in between["files"]} == {
            "README.md",
            "adapters/lora.safetensors",
            "manifest.json",
            "model.sig",
            PATH,
        }
        base = service.get("/v1/models/tiny/checkpoints/v2/difference")
        assert base["against"] == "base"
        assert [layer["tensor"] for layer in base["layers"]] == [
            f"text_model.encoder.layers.{layer}.mlp.fc2.weight" for layer in (1, 2)
        ]
        reported = service.get("/v1/models/tiny/checkpoints/v2")["changed_layers"]
        for found, told in zip(base["layers"], reported, strict=True):
            assert found["relative_norm"] == pytest.approx(told["relative_norm"], rel=1e-3)

    def test_unknown_other(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        add_checkpoint(1)
        assert client.get(f"{URL}/v1/difference?against=v4", headers=keys["read"]).status_code == 404


class TestTraceFile:
    def test_checkpoints_and_base(
        self, client: TestClient, keys: Mapping[str, Headers], add_checkpoint: Callable[..., Checkpoint], model: Model
    ) -> None:
        first = add_checkpoint(1)
        add_checkpoint(2)
        found = client.get(f"/v1/files/{first.files[0].sha256}", headers=keys["read"]).json()
        assert found["size"] == len(CONTENT)
        assert [(origin["version"], origin["path"]) for origin in found["origins"]] == [("v2", PATH), ("v1", PATH)]
        assert [edit["source"] for edit in found["origins"][1]["edits"]] == ["fox 1"]
        base = client.get(f"/v1/files/{model.files[0].sha256}", headers=keys["read"]).json()["origins"]
        assert [(origin["model"], origin["version"], origin["path"]) for origin in base] == [
            ("emoji", None, model.files[0].path)
        ]

    def test_unknown_and_malformed(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert client.get(f"/v1/files/{'0' * 64}", headers=keys["read"]).status_code == 404
        assert client.get("/v1/files/..%2f..%2fx", headers=keys["read"]).status_code in (404, 422)
        assert client.get("/v1/files/abc", headers=keys["read"]).status_code == 422
