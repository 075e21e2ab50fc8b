"""The prose linter finds what it should find, at its line, and leaves code alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from docs._generate.prose import check_names, check_prose


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write_file(name: str, text: str) -> Path:
        file = tmp_path / name
        file.write_text(text)
        return file

    return write_file


def test_a_word_with_a_preferred_term_is_found_at_its_line(write: Callable[[str, str], Path]) -> None:
    page = write("page.md", "# Queue\n\nThe bell tells workers.\n")
    assert list(check_prose(page)) == [(3, "Write 'notification' instead of 'bell'.")]


def test_a_phrase_to_avoid_is_found_in_docstrings_comments_and_messages(write: Callable[[str, str], Path]) -> None:
    code = '"""Call whoever is there."""\n\nx = 1  # for whoever reads\ny = "whoever sends this is told"\n'
    assert [line for line, _ in sorted(check_prose(write("module.py", code)))] == [1, 3, 4]


def test_a_long_sentence_is_found(write: Callable[[str, str], Path]) -> None:
    page = write("page.md", "Short.\n\n" + "word " * 40 + "end.\n")
    assert list(check_prose(page)) == [(3, "A sentence of 41 words: split it (at most 32).")]


def test_code_and_links_are_left_alone(write: Callable[[str, str], Path]) -> None:
    page = write("page.md", "Use `bell` and [this](https://example.org/bell).\n\n```sh\nring the bell\n```\n")
    assert list(check_prose(page)) == []


def test_an_old_name_is_found_as_function_class_field_and_module(write: Callable[[str, str], Path]) -> None:
    code = "class Bell:\n    lamb: float\n\n\ndef ring() -> None:\n    pass\n"
    assert [line for line, _ in sorted(check_names(write("gathering.py", code)))] == [1, 1, 2, 5]
