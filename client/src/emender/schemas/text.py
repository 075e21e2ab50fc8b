"""Text as a client may send it: neither Postgres nor a tokenizer takes NUL or half of a surrogate pair."""

import re
from typing import Annotated

from pydantic import AfterValidator

from editing.edits import has_half_a_pair


def storable(text: str) -> str:
    """The text itself; raises `ValueError` saying what cannot be kept."""
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    if has_half_a_pair(text):
        raise ValueError("must not hold half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(storable)]


def cell(text: str) -> str:
    """A client's words as plain text in Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&])", r"\\\1", " ".join(text.split()))
