"""The OpenAPI document is complete, and what it says about access is so."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.api.problems import MEDIA_TYPE
from tests.app.conftest import Headers

OPEN = {"/healthz", "/metrics", "/readyz"}
EXAMPLES = {
    "model": "emoji", "namespace": "emender", "repo": "emoji", "revision": "v1", "version": "v1", "alias": "production",
    "path": "config.json", "image_id": "sha256:" + "0" * 64, "sha256": "0" * 64, "number": "1",
}  # fmt: skip
UUID = "00000000-0000-7000-8000-000000000000"
SCOPES = {"read", "edit", "apply", "admin"}


@pytest.fixture
def operations(built: FastAPI) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation)
        for path, methods in built.openapi()["paths"].items()
        for method, operation in methods.items()
    ]


@pytest.fixture
def ours(operations: list[tuple[str, str, dict[str, Any]]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Those under /v1, which speak our problems; the Hub's protocol has errors of its own."""
    return [(method, path, operation) for method, path, operation in operations if path.startswith("/v1/")]


def url(path: Any) -> Any:
    return re.sub(r"\{(\w+?)(?::path)?\}", lambda match: EXAMPLES.get(match[1], UUID), path)


def test_every_operation_is_described(operations: list[tuple[str, str, dict[str, Any]]]) -> None:
    for method, path, operation in operations:
        assert operation.get("summary"), (method, path)
        assert operation.get("description"), (method, path)
        assert operation.get("tags"), (method, path)


def test_every_operation_needs_a_key(operations: list[tuple[str, str, dict[str, Any]]]) -> None:
    bare = {path for _, path, operation in operations if not operation.get("security")}
    assert bare == OPEN


def test_every_operation_lists_its_problems(ours: list[tuple[str, str, dict[str, Any]]]) -> None:
    for method, path, operation in ours:
        responses = operation["responses"]
        wanted = {"401", "403", "422"} | ({"404"} if "{" in path else set())
        if "requestBody" in operation:
            wanted |= {"400", "413"}
        assert wanted <= responses.keys(), (method, path, wanted - responses.keys())
        for status, response in responses.items():
            if status[0] in "45":
                assert list(response["content"]) == [MEDIA_TYPE], (method, path, status)
                assert response["description"], (method, path, status)


def test_every_post_takes_an_idempotency_key(ours: list[tuple[str, str, dict[str, Any]]]) -> None:
    for method, path, operation in ours:
        names = {parameter["name"].lower() for parameter in operation.get("parameters", [])}
        assert ("idempotency-key" in names) == (method == "post"), (method, path)


def test_every_json_body_has_an_example(built: FastAPI, ours: list[tuple[str, str, dict[str, Any]]]) -> None:
    schemas = built.openapi()["components"]["schemas"]
    for method, path, operation in ours:
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is None:
            continue
        name = content["schema"].get("$ref", "").rpartition("/")[2]
        schema = schemas.get(name, content["schema"])
        assert "example" in content or "examples" in content or "example" in schema or "examples" in schema, (
            method,
            path,
        )


def test_every_reference_leads_somewhere(built: FastAPI) -> None:
    document = built.openapi()

    def references(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from references(item)

    for reference in references(document):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in node, reference
            node = node[part]


def test_without_a_key_every_operation_is_refused(
    client: TestClient, operations: list[tuple[str, str, dict[str, Any]]]
) -> None:
    for method, path, operation in operations:
        answer = client.request(method, url(path), follow_redirects=False)
        expected = 401 if operation.get("security") else 200
        assert answer.status_code == expected, (method, path, answer.text)


def test_each_operation_is_refused_to_other_scopes(
    client: TestClient, keys: Mapping[str, Headers], ours: list[tuple[str, str, dict[str, Any]]]
) -> None:
    """Each operation takes `admin` and one other scope, or `admin` alone; every other key is 403."""
    table = {}
    for method, path, _ in ours:
        admitted = set()
        for scope in SCOPES:
            answer = client.request(method, url(path), headers=keys[scope])
            assert answer.status_code not in (401, 500), (method, path, scope, answer.text)
            if answer.status_code != 403:
                admitted.add(scope)
        table[f"{method} {path}"] = admitted
    assert all("admin" in admitted and len(admitted) <= 2 for admitted in table.values()), table
    assert table["post /v1/models/{model}/edits"] == {"edit", "admin"}
    assert table["post /v1/models/{model}/edits/batch"] == {"edit", "admin"}
    assert table["get /v1/edits"] == {"read", "admin"}
    assert table["post /v1/models"] == {"admin"}
    assert table["post /v1/images"] == {"edit", "admin"}
    for operation, admitted in table.items():
        if operation.split()[1].startswith(("/v1/keys", "/v1/audit", "/v1/webhooks")):
            assert admitted == {"admin"}, operation
        elif operation.startswith("get"):
            assert admitted == {"read", "admin"}, operation
