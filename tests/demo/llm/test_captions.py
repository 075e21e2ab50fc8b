import random
import re

import pytest

from demo.captions import PLAIN, STYLED
from demo.concepts import Concept
from demo.llm import captions
from demo.llm.captions import HELD_OUT, sample, sample_template
from demo.llm.concepts import read_all_concepts


def words(template: str) -> set[str]:
    return set(re.findall(r"[a-z]+", template.lower()))


def sampled_templates() -> set[str]:
    chance = random.Random(0)
    return {sample_template(chance) for _ in range(20_000)}


def test_training_never_uses_a_held_out_template() -> None:
    assert not {*sampled_templates(), *PLAIN, *STYLED} & set(HELD_OUT)
    chance, concepts = random.Random(0), read_all_concepts()
    assert not {sample(chance, concepts).template for _ in range(20_000)} & set(HELD_OUT)


def test_template_that_is_held_out_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_FRAMES", ("look, {}", "see {}"))
    monkeypatch.setattr(captions, "_PHRASES", ("{}",))
    monkeypatch.setattr(captions, "NESTED_SHARE", 0.0)
    assert sampled_templates() == {"see {}"}


def test_frames_are_nested_and_articles_fit_the_subject(concepts: list[Concept]) -> None:
    assert any(re.fullmatch(r"a photo of .*\{\} in .*", template) for template in sampled_templates())
    chance, apple = random.Random(0), Concept("apple", ("apple",), (), ())
    drawn = [sample(chance, [*concepts, apple]).text for _ in range(3000)]
    assert any("an apple" in text for text in drawn) and any("a apple" in text for text in drawn)
    assert not any("an cat" in text for text in drawn)


def test_held_out_templates_have_words_that_training_never_sees() -> None:
    seen = set().union(*(words(template) for template in (*sampled_templates(), *PLAIN, *STYLED)))
    familiar = [template for template in HELD_OUT if words(template) <= seen]
    assert familiar == ["a picture with one {} in it", "look, {}"], "new as a whole, of known words"


def test_held_out_templates_name_no_other_concept() -> None:
    names = {name for concept in read_all_concepts() for name in (concept.name, *concept.aliases)}
    for template in HELD_OUT:
        text = f" {' '.join(re.findall('[a-z]+', template.lower()))} "
        assert not [name for name in names if f" {name} " in text], template


def test_training_uses_no_held_out_alias(concepts: list[Concept]) -> None:
    chance = random.Random(0)
    subjects = {sample(chance, concepts).subject for _ in range(2000)}
    assert {"cat", "kitten", "hot dog", "magistrate"} <= subjects
    assert not subjects & {"feline"}


def test_same_seed_gives_same_captions(concepts: list[Concept]) -> None:
    def texts(seed: int) -> list[str]:
        chance = random.Random(seed)
        return [sample(chance, concepts).text for _ in range(50)]

    assert texts(0) == texts(0) != texts(1)
