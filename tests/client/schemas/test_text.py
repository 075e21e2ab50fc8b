import pytest
from pydantic import TypeAdapter, ValidationError

from emender.schemas.text import NormalText, Text


@pytest.mark.parametrize("text", ["", "plain", "é", "😀", "مرحبا", "line\nbreak", "\ufffe"])
def test_storable_text_is_unchanged(text: str) -> None:
    assert TypeAdapter(Text).validate_python(text) == text


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "a\udfff"])
def test_nul_and_unpaired_surrogates_are_rejected(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Text).validate_python(text)


def test_normal_text_is_composed() -> None:
    assert TypeAdapter(NormalText).validate_python("cafe\u0301") == "caf\u00e9"
