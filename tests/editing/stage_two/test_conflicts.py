"""What the words of edits alone show."""

import pytest
from PIL import Image

from editing.edits import Balance, Destination, DestinationPrompt, Erasure, ReferenceImages
from editing.stage_two.conflicts import Conflict, declared_conflicts, destination_names, sameness


@pytest.mark.parametrize("other", ["red  cat", " Red Cat ", "RED\tCAT"])
def test_sources_that_the_tokenizer_reads_alike(other: str) -> None:
    assert sameness(other) == sameness("red cat") != sameness("redcat")


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
    assert destination_names(destination) == names


def test_two_of_one_source_and_a_source_that_is_a_destination() -> None:
    found = declared_conflicts(["cat", "dog", "Cat", "owl"], [["dog"], ["bird", "OWL "], [], ["owl"]])
    assert found == (
        Conflict("same source", (0, 2)),
        Conflict("source is a destination", (1, 0)),
        Conflict("source is a destination", (3, 1)),
    )
