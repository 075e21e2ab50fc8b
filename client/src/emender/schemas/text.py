"""Text fields: Unicode that Postgres and tokenizers can store."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

PLACEHOLDER = "{}"


def check_storable(text: str) -> str:
    """Return the text. Raise `ValueError` if it has a NUL character or an unpaired surrogate."""
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain an unpaired surrogate") from None
    return text


def check_template(text: str) -> str:
    """Return the template. Raise `ValueError` unless it has the placeholder `{}` exactly once."""
    count = text.count(PLACEHOLDER)
    if count != 1:
        raise ValueError(f"must contain {{}} exactly once, where the concept goes; {text!r} has it {count} times")
    return text


def normalize(text: str) -> str:
    """Return the text in NFC, as tokenizers read it, so that sources that look alike are equal."""
    return unicodedata.normalize("NFC", text)


def escape_markdown(text: str) -> str:
    """Return the text on one line with its Markdown characters escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&])", r"\\\1", " ".join(text.split()))


Text = Annotated[str, AfterValidator(check_storable)]
