"""The held-out concepts of an evaluation."""

from types import SimpleNamespace
from typing import Any

import pytest

from editing.edits import ConceptEdit, DestinationPrompt, Erasure
from editing.evaluation.edit_sets import choose_held_out

CLASSIFIER: Any = SimpleNamespace(names=tuple(f"class {number}" for number in range(12)))


class TestChooseHeldOut:
    def test_classes_that_an_edit_names_are_left_out(self) -> None:
        edits = [
            ConceptEdit("class 0", DestinationPrompt("class 5")),
            ConceptEdit("class 11", Erasure()),
            ConceptEdit("unknown", DestinationPrompt("also unknown")),
        ]
        chosen = choose_held_out(CLASSIFIER, edits, count=12)
        assert chosen == [name for name in CLASSIFIER.names if name not in ("class 0", "class 5", "class 11")]

    @pytest.mark.parametrize(
        ("count", "numbers"), [(0, []), (1, [0]), (3, [0, 4, 8]), (5, [0, 2, 4, 7, 9]), (12, range(12))]
    )
    def test_classes_are_at_even_distances(self, count: int, numbers: Any) -> None:
        assert choose_held_out(CLASSIFIER, [], count=count) == [CLASSIFIER.names[number] for number in numbers]

    def test_at_most_every_class_is_chosen(self) -> None:
        assert choose_held_out(CLASSIFIER, [], count=100) == list(CLASSIFIER.names)

    def test_no_class_is_left_if_edits_name_all(self) -> None:
        edits = [ConceptEdit(name, Erasure()) for name in CLASSIFIER.names]
        assert choose_held_out(CLASSIFIER, edits, count=3) == []
