from pathlib import Path

import pytest

from demo.concepts import read_concepts
from demo.llm.concepts import read_all_concepts


def test_first_concepts_are_those_of_the_emoji_model() -> None:
    first, concepts = read_concepts(), read_all_concepts()
    assert concepts[: len(first)] == first
    assert len(concepts) >= 800


@pytest.mark.parametrize("line", ["Dog|dog||", "hound|dog||", "beast|dog|puppy|"])
def test_word_that_names_two_concepts_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "concepts.txt"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="names both 'dog' and"):
        read_all_concepts(path)
