"""The client reads captions with the module of the library; `tests/editing/test_captions.py` has its formats."""

from pathlib import Path

import pytest

import editing.captions
import emender.captions
from emender.errors import CaptionsUnreadable, EmenderError


def test_module_is_that_of_the_library() -> None:
    assert Path(editing.captions.__file__).resolve() == Path(emender.captions.__file__).resolve()


def test_error_is_one_of_the_client(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,title\n1,a cat\n")
    with pytest.raises(CaptionsUnreadable, match=r"a\.csv, line 1: there is no column") as caught:
        list(emender.captions.read_captions(tmp_path / "a.csv"))
    assert isinstance(caught.value, EmenderError)
