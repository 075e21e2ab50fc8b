import random
import re

from demo.captions import PLAIN, STYLED
from demo.concepts import Concept, read_concepts
from demo.llm.captions import HELD_OUT, sample, varied_templates


def words(template: str) -> set[str]:
    return set(re.findall(r"[a-z]+", template.lower()))


def test_training_never_uses_a_held_out_template() -> None:
    trained = {*varied_templates(), *PLAIN, *STYLED}
    assert not trained & set(HELD_OUT)
    chance, concepts, templates = random.Random(0), read_concepts(), varied_templates()
    assert not {sample(chance, concepts, templates).template for _ in range(20_000)} & set(HELD_OUT)


def test_held_out_templates_have_words_that_training_never_sees() -> None:
    seen = set().union(*(words(template) for template in (*varied_templates(), *PLAIN, *STYLED)))
    familiar = [template for template in HELD_OUT if words(template) <= seen]
    assert familiar == ["a picture with one {} in it", "look, {}"], "new as a whole, of known words"


def test_held_out_templates_name_no_other_concept() -> None:
    names = {name for concept in read_concepts() for name in (concept.name, *concept.aliases)}
    for template in HELD_OUT:
        text = f" {' '.join(re.findall('[a-z]+', template.lower()))} "
        assert not [name for name in names if f" {name} " in text], template


def test_training_uses_no_held_out_alias(concepts: list[Concept]) -> None:
    chance, templates = random.Random(0), varied_templates()
    subjects = {sample(chance, concepts, templates).subject for _ in range(2000)}
    assert {"cat", "kitten", "hot dog", "magistrate"} <= subjects
    assert not subjects & {"feline"}


def test_same_seed_gives_same_captions(concepts: list[Concept]) -> None:
    def captions(seed: int) -> list[str]:
        chance = random.Random(seed)
        return [sample(chance, concepts, varied_templates()).text for _ in range(50)]

    assert captions(0) == captions(0) != captions(1)
