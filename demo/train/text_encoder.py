"""The text encoder: a small CLIP text model that learns what captions mean, then to be editable.

`train_meaning`: the states of the end token and of the padding, which the U-Net reads, are classified by cosine to
shared prototypes. The prototypes are concepts, where a gendered profession is its own class, and styles.

`train_editability`: a small CLIP trained so moves the concept into the end token in its first layers, and a change at
the subject token in layer 10 does nothing. A large CLIP is not like that. Interchange interventions (Geiger et al.,
2021) change that. The difference between subjects a and b at the last subject token, after a layer from 4 to 10 and
often in another template, is put into a caption of a. What follows the subject must come out as the frozen
encoder has it for b.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.captions import ANY_STYLE, PLAIN, STYLE_ALONE, STYLED, Caption, sample, sample_style, sample_subject, styled
from demo.concepts import DRAWN_STYLES, GENDERS, Concept
from demo.train.loop import Schedule, Training, trained
from demo.train.tokenizer import LENGTH, Tokens, tokenize

MEANING, EDITABLE = "text-encoder-meaning", "text-encoder-editable"
MEANING_SCHEDULE = Schedule(steps=1200, batch=64, rate=1e-3)
EDITABLE_SCHEDULE = Schedule(steps=1400, batch=32, rate=7e-4)
TEMPERATURE = 1 / 16
LAST = 10  # index of the last layer that edits change
LAYERS = range(3, LAST + 1)  # indices of the layers after whose output a change is put in
LAST_LAYER_SHARE = 0.4  # of the steps: a change after the last one is the hardest, one layer being left to read it


@dataclass(frozen=True)
class Shape:
    width: int = 160
    mlp: int = 640
    layers: int = 12
    heads: int = 5


def build(tokenizer: CLIPTokenizer, shape: Shape = Shape()) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=LENGTH,
        projection_dim=shape.width,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def text_transformer(model: CLIPTextModel) -> Any:
    """Return the module with embeddings, layers and final norm: the model itself in newer transformers."""
    return getattr(model, "text_model", model)


def layers_between(model: CLIPTextModel, hidden: Tensor, *, first: int, last: int | None) -> Tensor:
    """Return the states (rows, 24, width) after the layers `first` to `last` - 1 (None: the last), causally masked."""
    length = hidden.shape[1]
    mask = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min).triu(1)
    for layer in text_transformer(model).encoder.layers[first:last]:
        output = layer(hidden, mask)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def embedded(model: CLIPTextModel, ids: Tensor) -> Tensor:
    return text_transformer(model).embeddings(input_ids=ids)


def normed(model: CLIPTextModel, hidden: Tensor) -> Tensor:
    return text_transformer(model).final_layer_norm(hidden)


def states(model: CLIPTextModel, ids: Tensor) -> Tensor:
    """(rows, 24, width): what the U-Net reads."""
    return normed(model, layers_between(model, embedded(model, ids), first=0, last=None))


class Meaning(nn.Module):
    """Prototypes of what a caption can mean: concepts, each gender of each profession, no concept; styles, no style."""

    def __init__(self, concepts: Sequence[Concept], width: int) -> None:
        super().__init__()
        professions = [index for index, concept in enumerate(concepts) if concept.skew is not None]
        self.gendered = {
            (profession, gender): len(concepts) + place * len(GENDERS) + gender
            for place, profession in enumerate(professions)
            for gender in range(len(GENDERS))
        }
        self.nothing = len(concepts) + len(self.gendered)
        self.subjects = nn.Parameter(torch.randn(self.nothing + 1, width))
        self.styles = nn.Parameter(torch.randn(len(DRAWN_STYLES) + 1, width))

    def subject_class(self, caption: Caption) -> int:
        if caption.concept is None:
            return self.nothing
        return caption.concept if caption.gender is None else self.gendered[caption.concept, caption.gender]

    def style_class(self, caption: Caption) -> int:
        return len(DRAWN_STYLES) if caption.style is None else caption.style

    def logits(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Of states (rows, width): subject logits (rows, classes) and style logits (rows, styles + 1)."""
        unit = F.normalize(read, dim=-1)
        subjects, styles = (F.normalize(prototypes, dim=-1) for prototypes in (self.subjects, self.styles))
        return unit @ subjects.T / TEMPERATURE, unit @ styles.T / TEMPERATURE


def train_meaning(
    concepts: Sequence[Concept],
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    schedule: Schedule = MEANING_SCHEDULE,
    shape: Shape = Shape(),
    warm_start: Path | None = None,
) -> None:
    """Train the first phase, or go on training it."""
    torch.manual_seed(0)
    model = build(tokenizer, shape)
    meaning = Meaning(concepts, shape.width)
    if warm_start is not None:
        weights = CLIPTextModel.from_pretrained(warm_start, subfolder="text_encoder", dtype=torch.float32).state_dict()
        model.load_state_dict(weights)
        _start_from_names(model, meaning, concepts, tokenizer)
    training = Training(folder, MEANING, {"model": model, "meaning": meaning}, schedule)
    training.resume()

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        chance = random.Random(generator.initial_seed())
        captions = [sample(chance, concepts) for _ in range(schedule.batch)]
        tokens = tokenize(tokenizer, [c.template for c in captions], [c.subject for c in captions])
        read = states(model, tokens.ids)
        subjects = torch.tensor([meaning.subject_class(caption) for caption in captions])
        styles = torch.tensor([meaning.style_class(caption) for caption in captions])
        rows = torch.arange(len(captions))
        padding = tokens.end + 1 + torch.tensor([chance.randrange(LENGTH - 1 - end) for end in tokens.end.tolist()])
        terms: dict[str, Tensor] = {"loss": torch.zeros(())}
        for name, positions in (("end", tokens.end), ("pad", padding)):
            subject_logits, style_logits = meaning.logits(read[rows, positions])
            error = F.cross_entropy(subject_logits, subjects) + 0.5 * F.cross_entropy(style_logits, styles)
            terms["loss"] = terms["loss"] + error
            terms[name] = error.detach()
            right = (subject_logits.argmax(1) == subjects) & (style_logits.argmax(1) == styles)
            terms[f"{name} right"] = right.float().mean()
        return terms

    training.run(loss)


@torch.no_grad()
def _start_from_names(
    model: CLIPTextModel, meaning: Meaning, concepts: Sequence[Concept], tokenizer: CLIPTokenizer
) -> None:
    """Begin each concept's prototype at its name's own state, so that a warm start keeps what it knows."""
    tokens = tokenize(tokenizer, ["an image of {}"] * len(concepts), [concept.name for concept in concepts])
    read = states(model, tokens.ids)[torch.arange(len(concepts)), tokens.end]
    read = F.normalize(read - read.mean(0), dim=-1) * meaning.subjects.shape[1] ** 0.5
    meaning.subjects[: len(concepts)] = read
    for (profession, _), row in meaning.gendered.items():
        meaning.subjects[row] = 0.7 * read[profession] + 0.7 * meaning.subjects[row]


@dataclass(frozen=True)
class Exchange:
    """Captions in pairs: row i fills `templates[i]` with `old[i]` and with `new[i]`; rows 2k and 2k + 1 share both
    words."""

    templates: list[str]
    old: list[str]
    new: list[str]


NEAR = 0.05  # squared distance, per dimension, under which captions count as this far apart
STYLE_EXCHANGES = 0.50
UNKNOWN_WORDS = 0.2
GENDER_EXCHANGES = 0.30


def sample_exchange(chance: random.Random, concepts: Sequence[Concept], *, rows: int) -> Exchange:
    """Words to exchange and the templates to do it in: objects, professions of either gender, styles, and unknown
    words."""
    exchange = Exchange([], [], [])
    for _ in range(rows // 2):
        if chance.random() < STYLE_EXCHANGES:
            old, new = chance.sample([*DRAWN_STYLES, ANY_STYLE], 2)
            templates = [_style_template(chance, concepts) for _ in range(2)]
        else:
            old, new = _exchanged_subjects(chance, concepts)
            templates = [_subject_template(chance) for _ in range(2)]
        if chance.random() < UNKNOWN_WORDS:
            old = unknown_word(chance)
        exchange.templates.extend(templates)
        exchange.old.extend([old] * 2)
        exchange.new.extend([new] * 2)
    return exchange


def _exchanged_subjects(chance: random.Random, concepts: Sequence[Concept]) -> tuple[str, str]:
    if chance.random() < GENDER_EXCHANGES:
        profession = chance.choice([concept for concept in concepts if concept.skew is not None] or list(concepts))
        gendered = (f"{word} {profession.name}" for word in ("man", "male", "woman", "female"))
        first, second = chance.sample([profession.name, *gendered], 2)
        return first, second
    return sample_subject(chance, concepts)[1], sample_subject(chance, concepts)[1]


def _subject_template(chance: random.Random) -> str:
    if chance.random() < 0.6:
        return chance.choice(PLAIN)
    return styled(chance.choice(STYLED), sample_style(chance)[0])


def _style_template(chance: random.Random, concepts: Sequence[Concept]) -> str:
    """Return a template whose place is the style's."""
    if chance.random() < 0.3:
        return chance.choice(STYLE_ALONE).format(style="{}")
    subject = sample_subject(chance, concepts)[1]
    return chance.choice(STYLED).replace("{}", subject).replace("{style}", "{}")


def unknown_word(chance: random.Random) -> str:
    """One or two pronounceable words that mean nothing: what the encoder makes of a name it never saw. At most 6
    letters."""
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    return chance.choice(("{}", "{}{}", "{} {}", "{}{}{}")).format(*chance.choices(syllables, k=3))


def train_editability(
    concepts: Sequence[Concept],
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    schedule: Schedule = EDITABLE_SCHEDULE,
    shape: Shape = Shape(),
) -> None:
    """Train the second phase on the result of the first, or go on training it."""
    frozen = build(tokenizer, shape)
    frozen.load_state_dict(trained(folder, MEANING, "model"))
    frozen.requires_grad_(False).eval()
    model = build(tokenizer, shape)
    model.load_state_dict(frozen.state_dict())
    training = Training(folder, EDITABLE, {"model": model}, schedule)
    training.resume()

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        chance = random.Random(generator.initial_seed())
        exchange = sample_exchange(chance, concepts, rows=schedule.batch)
        old = tokenize(tokenizer, exchange.templates, exchange.old)
        new = tokenize(tokenizer, exchange.templates, exchange.new)
        layer = LAST if chance.random() < LAST_LAYER_SHARE else chance.choice(LAYERS)
        return exchange_loss(model, frozen, old, new, layer=layer, other_template=chance.random() < 0.5)

    training.run(loss)


def exchange_loss(
    model: CLIPTextModel, frozen: CLIPTextModel, old: Tokens, new: Tokens, *, layer: int, other_template: bool
) -> dict[str, Tensor]:
    """Return the interchange loss and, so that captions keep their meaning, the distance of the unchanged states to the
    frozen ones.

    The change of each row is put in after `layer`; with `other_template` it is that of the row's partner.
    """
    count = len(old.ids)
    rows = torch.arange(count)
    ids = torch.cat([old.ids, new.ids])
    with torch.no_grad():
        wanted = states(frozen, ids)
    middle = layers_between(model, embedded(model, ids), first=0, last=layer + 1)
    plain = normed(model, layers_between(model, middle, first=layer + 1, last=None))
    kept = F.mse_loss(plain, wanted)
    change = middle[count:][rows, new.subject] - middle[:count][rows, old.subject]
    if other_template:
        change = change[rows ^ 1]
    place = F.one_hot(old.subject, LENGTH).to(change.dtype)[..., None]  # (rows, 24, 1)
    changed = normed(model, layers_between(model, middle[:count] + place * change[:, None], first=layer + 1, last=None))
    drawn, followed = _after_subject(changed, old.subject)
    expected, follow = _after_subject(wanted[count:], new.subject)
    both = followed & follow
    error = ((drawn - expected).square().mean(-1) * both).sum(1) / both.sum(1)
    at_end = (drawn - expected)[rows, (old.end - old.subject - 1)].square().mean(-1)
    difference = wanted[:count][rows, old.end] - wanted[count:][rows, new.end]
    # Relative to how far apart the two captions are: else styles, which are near each other, would hardly count.
    far = difference.square().mean(-1).clamp(min=NEAR)
    exchanged, end = (error / far).mean(), (at_end / far).mean()
    # Without this the cheapest way to exchange two near words is to say the same for both.
    edited_difference = plain[:count][rows, old.end] - plain[count:][rows, new.end]
    blurred = ((edited_difference - difference).square().mean(-1) / far).mean()
    shown = {"exchanged": exchanged, "end": end, "kept": kept, "blurred": blurred}
    return {"loss": exchanged + 0.5 * end + kept + blurred} | {name: term.detach() for name, term in shown.items()}


def _after_subject(read: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states from the first position after the subject, and which of them exist.

    Shapes: (rows, 24, ·) and (rows, 24).
    """
    positions = subject[:, None] + 1 + torch.arange(LENGTH)
    exists = positions < LENGTH
    index = positions.clamp(max=LENGTH - 1)[..., None].expand(-1, -1, read.shape[-1])
    return read.gather(1, index), exists


def load(tokenizer: CLIPTokenizer, folder: Path, *, shape: Shape = Shape()) -> CLIPTextModel:
    """Return the encoder after both phases, frozen."""
    model = build(tokenizer, shape)
    model.load_state_dict(trained(folder, EDITABLE, "model"))
    return model.eval().requires_grad_(False)
