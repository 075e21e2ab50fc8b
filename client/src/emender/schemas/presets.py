"""Fields of a request by name: what the client gives beside a preset comes first."""

from collections.abc import Mapping
from typing import Any


def with_preset(given: object, presets: Mapping[str, Mapping[str, Any]]) -> object:
    """A body's fields with those of its `preset` filled in. A name unknown is left for the field itself to refuse."""
    if isinstance(given, dict) and isinstance(name := given.get("preset"), str):
        return {**presets.get(name, {}), **given}
    return given
