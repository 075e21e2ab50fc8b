"""Rows 17 and 18: JSON and prompts as no honest client sends them. Never a 5xx, and nothing kept but what was shown."""

import unicodedata
from collections.abc import Mapping

import pytest
from fastapi.testclient import TestClient

from tests.app.conftest import Headers
from tests.seeded import Seeded

URL = "/v1/models/emoji/edits"
JSON = {"Content-Type": "application/json"}
DEEP = 100_000
BODIES = [
    b"[" * DEEP, b'{"source":' * DEEP, b'{"labels": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    b'{"source": "a", "source": "b", "destination": {"erase": true}}',
    b'{"source": "a", "destination": {"prompt": "b", "prompt": "c"}}',
    b'{"source": "a", "destination": {"balance": {"a": NaN, "b": 1}}}',
    b'{"source": "a", "destination": {"balance": {"a": Infinity, "b": 1}}}',
    b'{"source": "a", "destination": {"balance": {"a": 1e400, "b": 1}}}',
    b'{"source": "a", "destination": {"erase": true}, "settings": {"seed": ' + b"9" * 5000 + b"}}",
    b'{"source": "a", "destination": {"erase": true}, "settings": {"learning_rate": -0.0}}',
    b'{"source": "a", "destination": {"erase": true}, "__proto__": {"admin": true}}',
    b'{"source": ["a"], "destination": {"erase": true}}', b'{"source": {"$gt": ""}, "destination": {"erase": true}}',
    b'\xff\xfe{\x00}\x00', b"{'source': 'a'}",
    b'{"source": "a", "destination": {"erase": true}} {}', b'{"source": "a",}', b"", b"\0", b"nul", b"1e5", b"[[[]]]",
    b'{"source": "\\ud800", "destination": {"erase": true}}', b'{"source": "a\\u0000", "destination": {"erase": true}}',
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_hostile_json_is_rejected(client: TestClient, keys: Mapping[str, Headers], seeded: Seeded, body: bytes) -> None:
    for url in (URL, f"{URL}/batch"):
        answer = client.post(url, headers=keys["edit"] | JSON, content=body)
        assert answer.status_code in (400, 422), answer.text[:300]
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert len(client.get("/v1/edits", headers=keys["read"]).json()["items"]) == len(seeded.edits)


def test_a_large_json_body_is_rejected(client: TestClient, keys: Mapping[str, Headers], seeded: Seeded) -> None:
    body = b'{"source": "' + b"x" * 2**20 + b'", "destination": {"erase": true}}'
    assert client.post(URL, headers=keys["edit"] | JSON, content=body).status_code == 413


REFUSED = [
    "a\0b", "", " ", "x" * 501, "a <|endoftext|> b", "\U0001f600" * 251, "word " * 2000,
    "\u202efox\u202c", "\ufeffx", "\u200b",
]  # fmt: skip
KEPT = [
    "Präsident", "\u05d0\u05d1\u05d2", "\U0001f9d1\u200d\U0001f33e", "a\u0301",
    "'; DROP TABLE edits; --", "{{7*7}}", "${jndi:ldap://x}", "<script>alert(1)</script>", "%s%n", "=1+1",
]  # fmt: skip


@pytest.mark.parametrize("prompt", REFUSED, ids=lambda prompt: repr(prompt[:20]))
def test_invalid_prompts_are_rejected(
    client: TestClient, keys: Mapping[str, Headers], seeded: Seeded, prompt: str
) -> None:
    """Ten thousand tokens among them: nothing is cut off in silence."""
    body = {"source": prompt, "destination": {"prompt": "cat"}}
    answer = client.post(URL, headers=keys["edit"], json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"].startswith(("/source", "/templates"))


@pytest.mark.parametrize("prompt", KEPT, ids=ascii)
def test_prompts_are_returned_as_they_were_sent(
    client: TestClient, keys: Mapping[str, Headers], seeded: Seeded, prompt: str
) -> None:
    """Composed (NFC), so that twins are one source. One that the tokenizer reads as nothing is refused."""
    body = {
        "source": prompt,
        "destination": {"prompt": f"{prompt} cat"},
        "reason": prompt,
        "labels": {"ticket": prompt},
    }
    answer = client.post(URL, headers=keys["edit"], json=body)
    assert answer.status_code in (202, 422), answer.text
    if answer.status_code == 202:
        made = client.get(answer.headers["Location"], headers=keys["read"]).json()
        assert made["source"] == unicodedata.normalize("NFC", prompt)
        assert (made["reason"], made["labels"]) == (prompt, {"ticket": prompt})
    found = client.get("/v1/edits", headers=keys["read"], params={"source": prompt}).json()["items"]
    assert len(found) == (answer.status_code == 202)


def test_equivalent_unicode_forms_are_one_source(
    client: TestClient, keys: Mapping[str, Headers], seeded: Seeded
) -> None:
    for source in ("caf\u00e9", "cafe\u0301"):
        body = {"source": source, "destination": {"prompt": "bar"}}
        assert client.post(URL, headers=keys["edit"], json=body).status_code == 202
    found = client.get("/v1/edits", headers=keys["read"], params={"source": "cafe\u0301"}).json()["items"]
    assert [edit["source"] for edit in found] == ["caf\u00e9"] * 2
