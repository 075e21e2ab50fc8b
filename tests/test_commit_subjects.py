"""The commit-msg hook: which subjects it accepts."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["commitizen"]["customize"]


def is_accepted(message: str) -> bool:
    return re.match(CONFIGURATION["schema_pattern"], message) is not None


@pytest.mark.parametrize(
    "message",
    [
        "feat(client): add AsyncClient",
        "fix: process the queue",
        "refactor(api)!: rename settings",
        "docs: embed a picture\n\nReaders asked for one.\n",
        CONFIGURATION["example"],
    ],
)
def test_conventional_imperative_subjects_are_accepted(message: str) -> None:
    assert is_accepted(message)


@pytest.mark.parametrize(
    "message",
    [
        "add AsyncClient",
        "feature: add AsyncClient",
        "feat: Add AsyncClient",
        "feat: added AsyncClient",
        "feat: adding AsyncClient",
        "feat: adds AsyncClient",
        "feat: add AsyncClient.",
        "feat: add AsyncClient\nwithout a blank line",
        "feat: add " + "x" * 63,
    ],
)
def test_other_subjects_are_refused(message: str) -> None:
    assert not is_accepted(message)
