"""What a form's fields make of the body of a call, and where its errors are shown."""

import pytest

from app.admin.forms import Filled, asked, checked, document, items, lines, utc, weights, word
from app.problems import Unprocessable
from emender.schemas.edits import EditCreate

READINGS = {"/source": word, "/destination/prompt": word, "/destination/balance": weights, "/templates": lines}
READINGS |= {"/layers": items, "/add": checked, "/expires_at": utc}


def test_fields_are_pointers_into_the_body():
    form = Filled(
        {
            "/source": [" dog "],
            "/destination/prompt": [""],
            "/destination/balance": ["0.5 female doctor\r\n\r\n0.5  male doctor"],
            "/templates": ["a {}\r\n  {}  \r\n\r\n"],
            "/layers": ["0, 1 2"],
            "/add": ["a", "b"],
            "/expires_at": ["2026-11-24T12:00"],
            "/dry_run": ["true"],
            "/source/x": ["nobody asked for it"],
        }
    )
    assert document(form, READINGS) == {
        "source": "dog",
        "destination": {"balance": {"female doctor": "0.5", "male doctor": "0.5"}},
        "templates": ["a {}", "{}"],
        "layers": ["0", "1", "2"],
        "add": ["a", "b"],
        "expires_at": "2026-11-24T12:00Z",
    }
    assert document(Filled(), READINGS) == {}


def test_errors_stand_at_their_fields():
    form = Filled({"/source": ["dog"], "/templates": ["no place"], "/destination/prompt": [""]})
    with pytest.raises(Unprocessable) as refused:
        asked(EditCreate, {"source": "dog", "destination": {"prompt": ""}, "templates": ["", "x" * 501], "more": 1})
    form = form.refused(refused.value)
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
