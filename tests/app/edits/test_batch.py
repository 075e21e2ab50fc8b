import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Edit, Job, Model
from app.edits.batch import parse
from app.problems import MalformedBody, Unprocessable, UnsupportedMedia
from tests.app.conftest import Headers

URL = "/v1/models/emoji/edits/batch"
JSON, NDJSON, CSV = "application/json", "application/x-ndjson", "text/csv"


def edits(count: Any) -> Any:
    return [{"source": f"dog {number}", "destination": {"prompt": f"cat {number}"}} for number in range(count)]


class TestParse:
    def test_json_ndjson_and_csv_give_the_same_edits(self) -> None:
        wanted = edits(3)
        lines = "\n\n".join(json.dumps(edit) for edit in wanted)
        table = "source,destination\r\n" + "".join(f'"dog {n}",cat {n}\r\n' for n in range(3)) + "\r\n"
        parsed = parse(json.dumps(wanted).encode(), media_type=JSON)
        assert [edit.source for edit in parsed] == ["dog 0", "dog 1", "dog 2"]
        assert parse(lines.encode(), media_type=NDJSON) == parsed
        assert parse(table.encode("utf-8-sig"), media_type="text/csv; charset=utf-8") == parsed

    @pytest.mark.parametrize(
        "table",
        [
            "Source,DESTINATION\ndog,robot\n",
            "source;destination\r\ndog;robot\r\n",
            "destination\tsource\nrobot\tdog\n",
            "sep=;\nsource;destination\ndog; robot \n",
            "source,destination\r\ndog,robot\r\n,\r\n\r\n",
            "source,destination,,\ndog,robot,,\n",
        ],
    )
    def test_tables_of_spreadsheets_are_read(self, table: str) -> None:
        for body in (table.encode(), table.encode("utf-8-sig")):
            (edit,) = parse(body, media_type=CSV)
            assert (edit.source, edit.destination.prompt) == ("dog", "robot")

    def test_json_may_have_a_byte_order_mark(self) -> None:
        (edit,) = edits(1)
        for body, kind in ((json.dumps([edit]), JSON), (json.dumps(edit), NDJSON)):
            assert parse(body.encode("utf-8-sig"), media_type=kind) == parse(body.encode(), media_type=kind)

    def test_quoted_csv_cells_may_contain_commas_and_quotes(self) -> None:
        parsed = parse(b'source,destination\n"a, b","say ""c"""\n', media_type=CSV)
        assert (parsed[0].source, parsed[0].destination.prompt) == ("a, b", 'say "c"')

    @pytest.mark.parametrize(
        ("body", "kind", "error", "says"),
        [
            (b"[1,\n2 3]", JSON, MalformedBody, "body is not JSON: Expecting ',' delimiter in line 2"),
            (b'{"source": "a"}\nnonsense', NDJSON, MalformedBody, "line 2 is not JSON"),
            (b"\xff", CSV, MalformedBody, "not UTF-8"),
            (b'source,destination\n"a', CSV, MalformedBody, "line 2: is not valid CSV"),
            (b"from,to\na,b\n", CSV, MalformedBody, "line 1: there is no column 'source' or 'destination'"),
            (b"", CSV, MalformedBody, "line 1: the table is empty"),
            (b"source,target\na,b\n", CSV, Unprocessable, "source,destination, not source,target"),
            (b"source,destination,note\na,b,c\n", CSV, Unprocessable, "not destination,note,source"),
            (b"source,destination\na,b\n\na,b,c\n", CSV, MalformedBody, "line 4: has 3 cells, not 2"),
            (b"[]", "application/xml", UnsupportedMedia, "application/xml"),
            (b"[]", "", UnsupportedMedia, "untyped"),
        ],
    )
    def test_a_malformed_body_is_rejected(self, body: bytes, kind: Any, error: Any, says: str) -> None:
        with pytest.raises(error, match=says):
            parse(body, media_type=kind)

    @pytest.mark.parametrize("count", [0, 5001])
    def test_a_batch_has_1_to_the_maximum_of_edits(self, count: int) -> None:
        with pytest.raises(RequestValidationError):
            parse(json.dumps(edits(count)).encode(), media_type=JSON)


class TestCreateEdits:
    def post(self, client: TestClient, keys: Any, body: Any, kind: Any = JSON) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return client.post(URL, headers=keys["edit"] | {"Content-Type": kind}, content=content)

    def test_a_batch_creates_edits_jobs_and_one_audit_event(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        answer = self.post(client, keys, edits(3))
        assert answer.status_code == 202
        assert answer.json()["count"] == 3
        assert [edit["source"] for edit in answer.json()["edits"]] == ["dog 0", "dog 1", "dog 2"]
        ids = [edit["id"] for edit in answer.json()["edits"]]
        listed = client.get("/v1/edits", headers=keys["read"]).json()["items"]
        assert [edit["id"] for edit in listed] == ids[::-1]
        assert [str(target) for target in session.scalars(select(Job.target_id).order_by(Job.id))] == ids
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "edit.create_batch")).one()
        assert (event.target, event.details) == ("model:emoji", {"count": 3, "edits": ids})

    def test_one_invalid_edit_rejects_the_whole_batch(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        body = edits(20)
        body[17]["templates"] = ["no placeholder"]
        body[19]["destination"] = {"images": ["sha256:" + "0" * 64]}
        answer = self.post(client, keys, body)
        assert answer.status_code == 422
        pointers = [error["pointer"] for error in answer.json()["errors"]]
        assert pointers == ["/17/templates/0", "/19/destination/images/0"]
        assert session.scalar(select(func.count()).select_from(Edit)) == 0
        assert session.scalar(select(func.count()).select_from(Job)) == 0

    def test_errors_point_at_the_invalid_field(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model
    ) -> None:
        body = edits(3)
        body[2]["settings"] = {"optimization_steps": "many"}
        assert self.post(client, keys, body).json()["errors"][0]["pointer"] == "/2/settings/optimization_steps"
        lines = b'{"source": "a", "destination": {"prompt": "b"}}\n{"source": "a"}'
        assert self.post(client, keys, lines, NDJSON).json()["errors"][0]["pointer"] == "/1/destination"
        table = b"source,destination\ndog,cat\ndog,\n"
        assert self.post(client, keys, table, CSV).json()["errors"][0]["pointer"] == "/1/destination/prompt"

    def test_one_source_may_appear_twice(self, client: TestClient, keys: Mapping[str, Headers], model: Model) -> None:
        assert self.post(client, keys, [*edits(1), *edits(1)]).json()["count"] == 2

    def test_other_media_types_are_rejected(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model
    ) -> None:
        assert self.post(client, keys, b"<edits/>", "application/xml").status_code == 415

    def test_a_batch_requires_the_scope_edit(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model
    ) -> None:
        assert client.post(URL, headers=keys["read"], json=edits(1)).status_code == 403

    def test_a_thousand_edits_are_accepted(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        model: Model,
        record_property: Callable[[str, object], None],
    ) -> None:
        body = json.dumps(edits(1000)).encode()
        started = time.perf_counter()
        answer = self.post(client, keys, body)
        seconds = time.perf_counter() - started
        assert (answer.status_code, answer.json()["count"]) == (202, 1000)
        record_property("seconds for a batch of 1,000", round(seconds, 2))
        assert seconds < 20  # the promise is 2 s on a free machine; benchmarks measure it
