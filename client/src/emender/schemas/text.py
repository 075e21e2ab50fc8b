"""Text fields: Unicode that Postgres and tokenizers can store."""

import re
import unicodedata
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

PLACEHOLDER = "{}"

Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
"""Text without a NUL character. pydantic refuses unpaired surrogates."""
NormalText = Annotated[Text, AfterValidator(partial(unicodedata.normalize, "NFC"))]
"""Text in NFC, as tokenizers read it, so that texts that look alike are equal."""


def check_template(text: str) -> str:
    """Return the template. Raise `ValueError` unless it has the placeholder `{}` exactly once."""
    count = text.count(PLACEHOLDER)
    if count != 1:
        raise ValueError(f"must contain {{}} exactly once, where the concept goes; {text!r} has it {count} times")
    return text


def escape_markdown(text: str) -> str:
    """Return the text on one line with its Markdown characters escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&])", r"\\\1", " ".join(text.split()))
