"""Captions of the training: far more templates than the emoji model has, and templates that training never uses."""

import random
import re
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


_OPEN = tuple(frame for frame in _FRAMES if frame.endswith(" {}"))
_ADDED = tuple(frame for frame in _FRAMES if frame.startswith("{} ") or frame.startswith("{},"))
NESTED_SHARE = 0.30  # of the varied templates: "a photo of a big {} in the garden"
AN_SHARE = 0.50  # of the subjects that begin with a vowel: "an {}" in place of "a {}"


def sample_template(chance: random.Random) -> str:
    """Draw a frame, or two in one another, with a phrase in its place; never a held-out template."""
    template = chance.choice(_PHRASES)
    if chance.random() < NESTED_SHARE:
        template = chance.choice(_OPEN).format(chance.choice(_ADDED).format(template))
    else:
        template = chance.choice(_FRAMES).format(template)
    return sample_template(chance) if template in HELD_OUT else template


def sample(chance: random.Random, concepts: Sequence[Concept]) -> Caption:
    """Draw one caption."""
    if chance.random() < STYLE_ALONE_SHARE:
        word, style = sample_style(chance)
        return Caption(chance.choice(STYLE_ALONE).format(style="{}"), word, None, style=style)
    concept, subject, gender = _sample_subject(chance, concepts)
    style = None
    if chance.random() < STYLED_SHARE:
        word, style = sample_style(chance)
        template = styled(chance.choice(STYLED), word)
    else:
        template = chance.choice(PLAIN) if chance.random() < PLAIN_SHARE else sample_template(chance)
    if subject[0] in "aeiou" and chance.random() < AN_SHARE:
        template = re.sub(r"\ba \{\}", "an {}", template)
    return Caption(template, subject, concept, gender, style)


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
