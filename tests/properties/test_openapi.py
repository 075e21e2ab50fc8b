"""Random requests to each operation with each key: responses match the OpenAPI document."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
import schemathesis.core.failures
from fastapi.testclient import TestClient
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from jsonschema import validate
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks
from sqlalchemy import Engine
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from app.api.problems import MEDIA_TYPE
from app.main import create_app
from app.settings import Settings
from app.storage.local import LocalStore
from emender.schemas.common import ENDED, ProblemDocument
from tests.app.conftest import Headers, issue_keys
from tests.properties.conftest import CASES
from tests.seeded import Seeded, seed

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.missing_required_header,
]
OF_DATA = checks.response_schema_conformance
REJECTION = checks.negative_data_rejection
KEYS = ("read", "edit", "apply", "admin", "unknown", "none")
BASE = "http://testserver"


class Api:
    """The application on a database with one of everything, which commits."""

    def __init__(self, client: TestClient, keys: Mapping[str, Headers], seeded: Seeded) -> None:
        self.client = client
        self.keys = dict(keys) | {"unknown": {"Authorization": "Bearer em_000000000000_x"}, "none": {}}
        self.seeded = seeded

    def send(self, case: "schemathesis.Case[Any]", *, key: str) -> Any:
        given = case.as_transport_kwargs(base_url=BASE)
        given["headers"] = {
            name: value for name, value in given["headers"].items() if name.lower() not in ("authorization", "prefer")
        }
        sent = requests.Request(**given).prepare()
        headers: dict[str, Any] = dict(sent.headers) | self.keys[key]
        assert sent.method is not None and sent.url is not None
        assert sent.body is None or isinstance(sent.body, str | bytes)
        return self.client.request(
            sent.method, sent.url, headers=headers, content=sent.body or b"", follow_redirects=False
        )


@pytest.fixture
def api(tmp_path: Path, database_url: str, clean_database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    under_way = {"registering", "queued", "estimating", "optimizing", "building", "running", "cancelling"}
    monkeypatch.setattr(
        "app.api.waiting.ENDED", ENDED | under_way
    )  # no worker ends it: a stream ends at its first event
    url = make_url(database_url).update_query_dict({"options": "-c synchronous_commit=off"})
    settings = Settings(
        data_dir=tmp_path / "var",
        database_url=SecretStr(url.render_as_string(hide_password=False)),
        webhook_secret_key=SecretStr("k" * 40),
        rate_limit="off",
        failed_auth_rate_limit="off",
    )
    with (
        TestClient(create_app(settings), raise_server_exceptions=False) as client,
        Session(clean_database, expire_on_commit=False) as session,
    ):
        keys = issue_keys(session)
        store = LocalStore(settings.store_dir)
        yield Api(client, keys, seed(session, client, keys, store=store, folder=tmp_path / "tokenizer"))


@pytest.mark.parametrize("key", KEYS)
def test_every_response_is_documented(api: Api, examples: int, key: str) -> None:
    document = copy.deepcopy(api.client.app.openapi())  # type: ignore[attr-defined]
    secured = set()
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            if described.pop("security", None):  # or it would make up keys of its own
                secured.add((method, path))
    failures: list[str] = []
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        refused = key in ("unknown", "none") and (operation.method, operation.path) in secured
        for mode in GenerationMode:
            try:
                send_many(api, operation, mode, key=key, refused=refused, examples=examples)
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # there is nothing to be wrong about
            except (Exception, schemathesis.core.failures.FailureGroup) as error:
                failures.append(f"{operation.method} {operation.path}: {error}")
    assert not failures, "\n\n".join(failures)


def send_many(api: Api, operation: Any, mode: GenerationMode, *, key: str, refused: bool, examples: int) -> None:
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 10,  # CI is to tell what a change broke; more examples are to find more
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def holds(case: "schemathesis.Case[Any]", known: bool) -> None:
        CASES[f"schemathesis, {mode.value}, key {key}"] += 1
        chosen = list(CHECKS)
        if known:  # deeper than the first lookup
            names = case.path_parameters or {}
            case.path_parameters = {name: api.seeded.parameters.get(name, names[name]) for name in names}
            chosen.remove(REJECTION)  # what was wrong may have been put right by that
        check(case, api.send(case, key=key), checks=chosen, refused=refused)

    holds()


def check(case: "schemathesis.Case[Any]", answer: Any, *, checks: list[Any], refused: bool) -> None:
    if answer.headers.get("Content-Type", "").startswith("text/event-stream"):
        checks.remove(OF_DATA)  # it takes an event for a JSON object of its fields
    case.validate_response(answer, checks=checks)
    if answer.status_code >= 400:
        assert answer.headers["Content-Type"] == MEDIA_TYPE
        validate(answer.json(), ProblemDocument.model_json_schema())
        assert answer.json()["status"] == answer.status_code
    if refused:
        assert answer.status_code in (400, 401)
