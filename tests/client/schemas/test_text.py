import pytest
from pydantic import TypeAdapter, ValidationError

from emender.schemas.text import Text, storable


@pytest.mark.parametrize("text", ["", "plain", "é", "😀", "مرحبا", "line\nbreak", "\ufffe"])
def test_storable(text):
    assert storable(text) == text
    assert TypeAdapter(Text).validate_python(text) == text


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "a\udfff"])
def test_refused(text):
    with pytest.raises(ValueError, match="must not hold"):
        storable(text)
    with pytest.raises(ValidationError):
        TypeAdapter(Text).validate_python(text)
