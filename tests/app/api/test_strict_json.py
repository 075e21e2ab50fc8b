import json
from typing import Any

import pytest

from app.api.strict_json import loads

pytestmark = pytest.mark.security


def test_json() -> None:
    assert loads(b'{"a": [1, 2.5, null, true, "\\u00e9"], "b": {"a": {}}}') == {
        "a": [1, 2.5, None, True, "é"],
        "b": {"a": {}},
    }


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"NaN", "NaN is not JSON"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"1e999", "too large"),
        (b"9" * 5000, "integer"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"{'a': 1}", "property name"),
        (b"", "Expecting value"),
        (b"[1,]", "Expecting value|trailing comma"),
    ],
)
def test_refused(body: Any, says: str) -> None:
    with pytest.raises(json.JSONDecodeError, match=says):
        loads(body)
