"""The reference pages say what the code says."""

from typing import Any

import pytest

import app.worker.problems
import app.worker.sources  # its errors are found below
from app.problems import Problem
from app.settings import Settings
from docs._generate.reference import FOLDER, pages, slug
from editing.errors import EditingError


@pytest.mark.parametrize("name", ["api.md", "settings.md", "cli.md", "exit-codes.md", "metrics.md"])
def test_each_page_is_current(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == pages()[name], "run `make reference`"


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def kinds(of: type[Exception]) -> set[Any]:
    return {each for kind in of.__subclasses__() for each in {kind, *kinds(kind)}}


def test_every_problem_has_its_section() -> None:
    page = (FOLDER / "problems.md").read_text(encoding="utf-8")
    for problem in sorted({(kind.title, int(kind.status)) for kind in kinds(Problem) | {Problem}}):
        assert f"\n## {problem[0]}\n\n**{problem[1]}**" in page, problem


def test_every_failure_of_a_job_is_described() -> None:
    page = (FOLDER / "problems.md").read_text(encoding="utf-8")
    titles = {str(app.worker.problems.problem_of(kind("x"))["title"]) for kind in kinds(EditingError)}
    titles |= {"Damaged store", "Storage failed", "Internal error"}
    assert [title for title in sorted(titles) if f"\n- **{title}**: " not in page] == []


def test_slug_is_the_builders() -> None:
    assert slug("Page_EditOut_") == "page_editout_"
    assert slug("API key not found") == "api-key-not-found"
