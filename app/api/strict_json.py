"""JSON as RFC 8259 has it: no NaN, no infinite numbers, no key given twice. Python's own parser takes all three."""

import json
import math
from typing import Any, NoReturn


def loads(body: bytes) -> Any:
    """Parse a body in UTF-8; raises `json.JSONDecodeError`, and nothing else, with a message fit for a client."""
    try:
        text = body.decode("utf-8-sig")  # a byte-order mark may be ignored (RFC 8259, section 8.1)
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"not UTF-8 at byte {error.start}", "", 0) from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except ValueError as error:  # of the hooks, or an integer of thousands of digits
        raise json.JSONDecodeError(str(error), "", 0) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return result


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
