"""The request body that a form makes, and where its errors are shown."""

import pytest

from app.admin.forms import EMPTY_FORM, FormData, checked, items, lines, utc, validate, weights
from app.problems import Unprocessable
from emender.schemas.edits import EditCreate

READERS = {"/destination/balance": weights, "/templates": lines, "/layers": items, "/add": checked, "/expires_at": utc}


def test_field_names_are_pointers_into_the_body() -> None:
    form = FormData(
        {
            "/source": [" dog "],
            "/destination/prompt": [""],
            "/destination/balance": ["0.5 female doctor\r\n\r\n0.5  male doctor"],
            "/templates": ["a {}\r\n  {}  \r\n\r\n"],
            "/layers": ["0, 1 2"],
            "/add": ["a", "b"],
            "/expires_at": ["2026-11-24T12:00"],
            "/remove": [],
            "text": ["not in the body"],
        }
    )
    assert form.body(READERS) == {
        "source": "dog",
        "destination": {"balance": {"female doctor": "0.5", "male doctor": "0.5"}},
        "templates": ["a {}", "{}"],
        "layers": ["0", "1", "2"],
        "add": ["a", "b"],
        "expires_at": "2026-11-24T12:00Z",
    }
    assert EMPTY_FORM.body(READERS) == {}


def test_a_value_and_its_parts_under_one_name_do_not_break_the_body() -> None:
    """Only a forged form has such fields."""
    with pytest.raises(Unprocessable):
        FormData({"/source": ["dog"], "/source/x": ["cat"]}).parse(EditCreate)


def test_errors_belong_to_their_fields() -> None:
    form = FormData({"/source": ["dog"], "/templates": ["no place"], "/destination/prompt": [""]})
    with pytest.raises(Unprocessable) as refused:
        validate(EditCreate, {"source": "dog", "destination": {"prompt": ""}, "templates": ["", "x" * 501], "more": 1})
    form = form.with_problem(refused.value)
    assert {error.pointer for error in refused.value.errors} == {
        "/destination/prompt",
        "/templates/0",
        "/templates/1",
        "/more",
    }
    assert len(form.errors("/templates")) == 2
    assert len(form.errors("/destination/prompt")) == 1
    assert form.errors("/source") == form.errors("/template") == []
    assert [form.field_of(p) for p in ("/templates/1", "/more", "", "captions")] == ["/templates", None, None, None]
