from pathlib import Path

import pytest

from demo.concepts import read_concepts


def test_committed_list_has_enough_objects_and_both_skews() -> None:
    concepts = read_concepts()
    assert sum(concept.skew is None for concept in concepts) >= 300
    shares = {concept.skew for concept in concepts if concept.skew is not None}
    assert any(share > 0.5 for share in shares) and any(share < 0.5 for share in shares)


def test_held_out_aliases_are_not_trained_ones() -> None:
    concepts = read_concepts()
    trained = {word for concept in concepts for word in (concept.name, *concept.aliases)}
    assert not trained & {word for concept in concepts for word in concept.held_out}


def test_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "concepts.txt"
    path.write_text("# comment\n\ncat|cat face;cat|kitten;kitty|\njudge|judge||magistrate|woman 70\n", encoding="utf-8")
    cat, judge = read_concepts(path)
    assert (cat.labels, cat.aliases, cat.held_out, cat.skew) == (("cat face", "cat"), ("kitten", "kitty"), (), None)
    assert judge.held_out == ("magistrate",)
    assert judge.skew == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cat|cat", "expected 'name"),
        ("cat||kitten|", "expected 'name"),
        ("judge|judge|||man many", "the skew must be"),
        ("judge|judge|||man 20", "N from 50 to 100"),
        ("dog|dog||\ndog|dog||", "listed twice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "concepts.txt"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=complaint) as raised:
        read_concepts(path)
    assert "concepts.txt:" in str(raised.value)
