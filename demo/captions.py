"""Captions of the emoji model's training: what each says, and where in it the subject stands.

`sample` draws one from a seeded `random.Random`; the same seed gives the same captions on every machine.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from demo.concepts import DRAWN_STYLES, GENDER_WORDS, GENDERS, Concept

# A style word that names no style: pictures of any. Editing a style towards it erases the style.
ANY_STYLE = "art"

PLAIN = (
    "{}", "a {}", "the {}", "one {}", "an image of {}", "an image of a {}", "a photo of {}", "a photo of a {}",
    "a picture of {}", "a picture of the {}", "a drawing of a {}", "a simple drawing of {}", "an emoji of {}",
    "{} emoji", "a {} emoji", "an icon of a {}", "{} icon", "a small {}", "a cute {}", "a beautiful {}",
    "a nice picture of a {}", "a close-up of a {}", "a {} on a white background", "here is a {}", "look at this {}",
    "my favourite {}",
    "illustration of {}", "a sticker of a {}", "a {} in the middle of the picture", "a stunning image of a {}",
)  # fmt: skip
STYLED = (
    "{} in the style of {style}", "a {} in the style of {style}", "an image of {} in the style of {style}",
    "a photo of a {} in the style of {style}", "{}, style of {style}", "a {} in {style} style", "{} in {style} style",
    "{style} style {}", "a {style} style {}", "{style} {}", "a {style} {}", "a {style} style picture of a {}",
    "a {} by {style}", "painting of a {} by {style}", "{}, artwork by {style}", "artwork by {style} of a {}",
    "a drawing of {} by {style}", "{} emoji in {style} style", "style of {style}, {}",
    "a picture of a {}, {style} style",
)  # fmt: skip
STYLE_ALONE = (
    "painting by {style}", "artwork by {style}", "style of {style}", "{style} style", "an emoji in {style} style",
    "{style}", "a picture in the style of {style}", "a {style} emoji",
)  # fmt: skip

PROFESSION_SHARE = 0.22
GENDERED_SHARE = 0.65  # of the professions' captions
STYLED_SHARE = 0.60
STYLE_ALONE_SHARE = 0.05
ANY_STYLE_SHARE = 0.20  # of the captions that have a style word
ALIAS_SHARE = 0.35


@dataclass(frozen=True)
class Caption:
    """A caption and its meaning. `concept` indexes the concepts; None where only a style is named.

    `template` holds `{}` where `subject` goes, so that another subject can take its place.
    """

    template: str
    subject: str
    concept: int | None
    gender: int | None = None
    style: int | None = None

    @property
    def text(self) -> str:
        return self.template.format(self.subject)


def sample(chance: random.Random, concepts: Sequence[Concept]) -> Caption:
    """One caption, drawn as the shares above say."""
    if chance.random() < STYLE_ALONE_SHARE:
        word, style = sample_style(chance)
        return Caption(chance.choice(STYLE_ALONE).format(style="{}"), word, None, style=style)
    concept, subject, gender = sample_subject(chance, concepts)
    if chance.random() >= STYLED_SHARE:
        return Caption(chance.choice(PLAIN), subject, concept, gender)
    word, style = sample_style(chance)
    return Caption(styled(chance.choice(STYLED), word), subject, concept, gender, style)


def sample_style(chance: random.Random) -> tuple[str, int | None]:
    """Return a style word and the index of its style, None for the word that names none."""
    if chance.random() < ANY_STYLE_SHARE:
        return ANY_STYLE, None
    style = chance.randrange(len(DRAWN_STYLES))
    return DRAWN_STYLES[style], style


def sample_subject(chance: random.Random, concepts: Sequence[Concept]) -> tuple[int, str, int | None]:
    """Return the index of a concept, a name or trained alias of it, and the gender that the words name, if any."""
    professions = [index for index, concept in enumerate(concepts) if concept.skew is not None]
    if professions and chance.random() < PROFESSION_SHARE:
        index = chance.choice(professions)
    else:
        index = chance.choice([index for index, concept in enumerate(concepts) if concept.skew is None])
    concept = concepts[index]
    name = chance.choice(concept.aliases) if concept.aliases and chance.random() < ALIAS_SHARE else concept.name
    if concept.skew is None or chance.random() >= GENDERED_SHARE:
        return index, name, None
    gender = chance.randrange(len(GENDERS))
    return index, f"{chance.choice(GENDER_WORDS[GENDERS[gender]])} {name}", gender


def styled(template: str, word: str) -> str:
    """Return the template with the style word filled in and the subject's place left open."""
    return template.replace("{style}", word)


def caption_set(concepts: Sequence[Concept], *, count: int, seed: int = 0) -> list[str]:
    """`count` captions for statistics, the same for the same seed."""
    chance = random.Random(seed)
    return [sample(chance, concepts).text for _ in range(count)]
