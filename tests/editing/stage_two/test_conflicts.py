"""Conflicts that the texts of edits show."""

import pytest
from PIL import Image

from editing.edits import Balance, Destination, DestinationPrompt, Erasure, ReferenceImages
from editing.stage_two.conflicts import Conflict, find_declared_conflicts, list_destination_names, normalize_source


@pytest.mark.parametrize("other", ["red  cat", " Red Cat ", "RED\tCAT"])
def test_case_and_spaces_do_not_distinguish_sources(other: str) -> None:
    assert normalize_source(other) == normalize_source("red cat") != normalize_source("redcat")


@pytest.mark.parametrize(
    ("destination", "names"),
    [
        (DestinationPrompt("dog"), ("dog",)),
        (Erasure(), ()),
        (Erasure("art"), ("art",)),
        (Balance({"bird": 1, "fish": 2}), ("bird", "fish")),
        (ReferenceImages((Image.new("RGB", (8, 8)),)), ()),
    ],
)
def test_names_of_a_destination(destination: Destination, names: tuple[str, ...]) -> None:
    assert list_destination_names(destination) == names


def test_finds_equal_sources_and_sources_that_are_destinations() -> None:
    found = find_declared_conflicts(["cat", "dog", "Cat", "owl"], [["dog"], ["bird", "OWL "], [], ["owl"]])
    assert found == (
        Conflict("same source", (0, 2)),
        Conflict("source is a destination", (1, 0)),
        Conflict("source is a destination", (3, 1)),
    )
