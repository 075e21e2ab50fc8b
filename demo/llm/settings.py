"""Settings of edits as a command takes them."""

import json
from collections.abc import Sequence
from typing import Any


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return what `name=value` pairs set. A value that is no JSON is text."""
    return {name: _read_value(value) for name, value in (pair.split("=") for pair in pairs)}


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
