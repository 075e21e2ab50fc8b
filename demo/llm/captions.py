"""Captions of the training: far more templates than the emoji model has, and templates that training never uses."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from demo.captions import PLAIN, STYLE_ALONE, STYLED, Caption, sample_style, styled
from demo.concepts import GENDER_WORDS, GENDERS, Concept

_FOLDER = Path(__file__).parent
_FRAMES = tuple((_FOLDER / "frames.txt").read_text(encoding="utf-8").splitlines())

HELD_OUT = tuple((_FOLDER / "held-out.txt").read_text(encoding="utf-8").splitlines())
"""Templates that training never uses, chosen before the first step. `sample` cannot make any of them."""

_ADJECTIVES = (
    "small", "big", "large", "little", "cute", "nice", "beautiful", "pretty", "lovely", "new", "plain", "simple",
    "ordinary", "typical", "single", "great", "wonderful", "strange", "colorful", "shiny", "perfect", "real", "tidy",
    "cheerful", "modern", "fancy", "huge", "bright",
)  # fmt: skip
_PHRASES = (
    "{}", "a {}", "the {}", "one {}", "my {}", "this {}", "that {}", "our {}", "his {}", "another {}", "any {}",
    *(f"a {adjective} {{}}" for adjective in _ADJECTIVES),
    *(f"the {adjective} {{}}" for adjective in _ADJECTIVES[::4]),
)  # fmt: skip
PROFESSION_SHARE = 0.10
GENDERED_SHARE = 0.65  # of the professions' captions
ALIAS_SHARE = 0.35
STYLE_ALONE_SHARE = 0.02
STYLED_SHARE = 0.20
PLAIN_SHARE = 0.20  # of the captions without a style: the emoji model's own templates


def varied_templates() -> list[str]:
    """Return every frame with every phrase in its place, without the held-out templates."""
    made = (frame.format(phrase) for frame, phrase in itertools.product(_FRAMES, _PHRASES))
    return sorted(set(made) - set(HELD_OUT))


def sample(chance: random.Random, concepts: Sequence[Concept], templates: Sequence[str]) -> Caption:
    """Draw one caption; `templates` are those of `varied_templates`."""
    if chance.random() < STYLE_ALONE_SHARE:
        word, style = sample_style(chance)
        return Caption(chance.choice(STYLE_ALONE).format(style="{}"), word, None, style=style)
    concept, subject, gender = _sample_subject(chance, concepts)
    if chance.random() < STYLED_SHARE:
        word, style = sample_style(chance)
        return Caption(styled(chance.choice(STYLED), word), subject, concept, gender, style)
    template = chance.choice(PLAIN if chance.random() < PLAIN_SHARE else templates)
    return Caption(template, subject, concept, gender)


def _sample_subject(chance: random.Random, concepts: Sequence[Concept]) -> tuple[int, str, int | None]:
    """Return the index of a concept, a name or trained alias of it, and the gender that the words name, if any."""
    is_profession = chance.random() < PROFESSION_SHARE
    index = chance.choice([i for i, concept in enumerate(concepts) if (concept.skew is not None) == is_profession])
    concept = concepts[index]
    name = chance.choice(concept.aliases) if concept.aliases and chance.random() < ALIAS_SHARE else concept.name
    if concept.skew is None or chance.random() >= GENDERED_SHARE:
        return index, name, None
    gender = chance.randrange(len(GENDERS))
    return index, f"{chance.choice(GENDER_WORDS[GENDERS[gender]])} {name}", gender
