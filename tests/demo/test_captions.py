import random
from collections import Counter

from demo.captions import PROFESSION_SHARE, caption_set, sample
from demo.concepts import DRAWN_STYLES, GENDER_WORDS, GENDERS, read_concepts

CONCEPTS = read_concepts()


def test_same_seed_same_captions() -> None:
    assert caption_set(CONCEPTS, count=50, seed=3) == caption_set(CONCEPTS, count=50, seed=3)
    assert caption_set(CONCEPTS, count=50, seed=3) != caption_set(CONCEPTS, count=50, seed=4)


def test_a_caption_says_what_it_means() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        caption = sample(chance, CONCEPTS)
        assert caption.template.count("{}") == 1
        assert caption.text.count(caption.subject) >= 1
        if caption.style is not None:
            assert DRAWN_STYLES[caption.style] in caption.text
        if caption.concept is not None:
            concept = CONCEPTS[caption.concept]
            words = (
                caption.subject.removeprefix("man ")
                .removeprefix("woman ")
                .removeprefix("male ")
                .removeprefix("female ")
            )
            assert words in (concept.name, *concept.aliases) or caption.subject in (concept.name, *concept.aliases)
        if caption.gender is not None:
            assert caption.subject.split()[0] in GENDER_WORDS[GENDERS[caption.gender]]


def test_held_out_aliases_are_never_said() -> None:
    held_out = {alias for concept in CONCEPTS for alias in concept.held_out}
    chance = random.Random(1)
    assert not held_out & {sample(chance, CONCEPTS).subject for _ in range(5000)}


def test_gendered_professions_are_a_fair_share() -> None:
    """Fifteen to twenty-five in a hundred captions are of professions, men and women as often."""
    chance = random.Random(2)
    captions = [sample(chance, CONCEPTS) for _ in range(4000)]
    professions = [c for c in captions if c.concept is not None and CONCEPTS[c.concept].skew is not None]
    assert abs(len(professions) / len(captions) - PROFESSION_SHARE) < 0.03
    genders = Counter(caption.gender for caption in professions)
    assert 0.8 < genders[0] / genders[1] < 1.25
