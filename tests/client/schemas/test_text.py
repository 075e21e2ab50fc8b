import pytest
from pydantic import TypeAdapter, ValidationError

from emender.schemas.text import Text, check_storable


@pytest.mark.parametrize("text", ["", "plain", "é", "😀", "مرحبا", "line\nbreak", "\ufffe"])
def test_storable_text_is_unchanged(text):
    assert check_storable(text) == text
    assert TypeAdapter(Text).validate_python(text) == text


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "a\udfff"])
def test_nul_and_unpaired_surrogates_are_rejected(text):
    with pytest.raises(ValueError, match="must not contain"):
        check_storable(text)
    with pytest.raises(ValidationError):
        TypeAdapter(Text).validate_python(text)
