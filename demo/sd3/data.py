"""What a step of the training draws from, all of it on one device: captions as token ids, and latents of the art."""

import json
import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from demo import art
from demo.captions import PLAIN, Caption
from demo.concepts import DRAWN_STYLES, GENDERS, Concept, read_concepts
from demo.llm.build import load_autoencoder
from demo.llm.captions import AN_SHARE, PLAIN_SHARE, sample_template
from demo.llm.train import drawn_art
from demo.sd3.pipeline import CLIP_LENGTH, T5_LENGTH
from demo.train.autoencoder import Latents, latents
from demo.train.unet import CENTRED_SHARE

EMPTY_SHARE = 0.10
ALIAS_SHARE = 0.15
STYLE = DRAWN_STYLES.index("noto")
"""Of every picture. No caption names it."""
CAPTION_LENGTH = 16
"""Tokens of the longest caption, for CLIP and for T5."""
PICTURES = 2
"""Of a caption in a batch, which is encoded once."""


def read_drawn() -> frozenset[str]:
    """Return the names of the concepts that the pipeline draws. Each is one word."""
    return frozenset((Path(__file__).parent / "concepts.txt").read_text(encoding="utf-8").split())


def draw_captions(
    concepts: Sequence[Concept], names: Collection[str] | None = None, *, count: int, seed: int = 0
) -> list[Caption]:
    """Return `count` captions of the concepts of these names, by default of those that the pipeline draws.

    The same seed gives the same captions. None has a held-out template.
    """
    chance = random.Random(seed)
    names = read_drawn() if names is None else names
    drawn = [(index, concept) for index, concept in enumerate(concepts) if concept.name in names]
    captions = []
    for _ in range(count):
        index, concept = chance.choice(drawn)
        name = chance.choice(concept.aliases) if concept.aliases and chance.random() < ALIAS_SHARE else concept.name
        template = chance.choice(PLAIN) if chance.random() < PLAIN_SHARE else sample_template(chance)
        if name[0] in "aeiou" and chance.random() < AN_SHARE:
            template = re.sub(r"\ba \{\}", "an {}", template)
        captions.append(Caption(template, name, index, style=STYLE))
    return captions


@dataclass(frozen=True)
class PictureLabels:
    """What pictures show, (N,) each; the gender is -1 where the concept has none."""

    concept: Tensor
    style: Tensor
    gender: Tensor


@dataclass(frozen=True)
class Pictures:
    """The art as latents, sorted by concept, style and gender.

    `mean` and `std` (N, copies, 4, 8, 8); `first` and `count` (concepts, styles, genders + 1) say where the pictures of
    each are, those without a gender last; `men` (concepts,) is the share of men in a profession, -1 for other concepts.
    """

    mean: Tensor
    std: Tensor
    first: Tensor
    count: Tensor
    men: Tensor

    @classmethod
    def sort(cls, latents: Latents, pictures: PictureLabels, concepts: Sequence[Concept]) -> Self:
        """Sort latents of pictures in the styles that a caption can name."""
        genders = len(GENDERS) + 1
        group = (pictures.concept * len(DRAWN_STYLES) + pictures.style) * genders + pictures.gender % genders
        order = group.argsort(stable=True)
        shape = (len(concepts), len(DRAWN_STYLES), genders)
        count = torch.bincount(group, minlength=math.prod(shape))
        men = [-1.0 if concept.skew is None else concept.skew for concept in concepts]
        return cls(
            latents.mean[order],
            latents.std[order],
            (count.cumsum(0) - count).view(shape),
            count.view(shape),
            torch.tensor(men),
        )

    @classmethod
    def load(cls, path: Path, concepts: Sequence[Concept]) -> Self:
        """Read the file of `encode_art`. Raises ValueError if the concepts have changed since."""
        with safe_open(path, "pt") as file:
            if json.loads(file.metadata()["concepts"]) != [concept.name for concept in concepts]:
                raise ValueError(f"{path} was made for other concepts; remove it")
            read = {key: file.get_tensor(key) for key in file.keys()}
        labels = PictureLabels(read["concept"], read["style"], read["gender"])
        return cls.sort(Latents(read["mean"], read["std"]), labels, concepts)

    def choose(self, concept: Tensor, style: Tensor, gender: Tensor) -> Tensor:
        """Return rows (n,) of pictures that fit. -1 leaves a concept, a style or a gender (n,) open."""
        concept = torch.where(concept < 0, torch.randint_like(concept, len(self.men)), concept)
        style = torch.where(style < 0, torch.randint_like(style, len(DRAWN_STYLES)), style)
        men = self.men[concept]
        drawn = (torch.rand_like(men) >= men).long()
        gender = torch.where(gender < 0, drawn, gender).masked_fill(men < 0, len(GENDERS))
        first, count = self.first[concept, style, gender], self.count[concept, style, gender]
        return first + (torch.rand_like(men) * count).long()


def encode_art(path: Path, art_file: Path) -> None:
    """Write the latents of the styles that a caption can name, in float16."""
    pictures = drawn_art(art.load(art_file))
    encoded = latents(load_autoencoder(), pictures)
    tensors = {"concept": pictures.concept, "style": pictures.style, "gender": pictures.gender}
    tensors |= {"mean": encoded.mean.half(), "std": encoded.std.half()}
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [concept.name for concept in read_concepts()]
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, path, metadata={"concepts": json.dumps(names)}
    )


@dataclass(frozen=True)
class Captions:
    """Captions as token ids: `clip` (n, 24) and `t5` (n, 32), and what they say (n,), -1 for nothing.

    The first is the empty one.
    """

    clip: Tensor
    t5: Tensor
    concept: Tensor
    style: Tensor
    gender: Tensor

    @classmethod
    def tokenize(
        cls, captions: Sequence[Caption], clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast
    ) -> Self:
        """Tokenize as the pipeline does, without the captions that are too long."""
        captions = [Caption("{}", "", None), *captions]
        texts = [caption.text for caption in captions]
        clip_ids = clip_tokenizer(texts, padding="max_length", max_length=CLIP_LENGTH).input_ids
        t5_ids = t5_tokenizer(texts, padding="max_length", max_length=T5_LENGTH).input_ids
        counted = (tokenizer(texts).input_ids for tokenizer in (clip_tokenizer, t5_tokenizer))
        fitting = [row for row, ids in enumerate(zip(*counted, strict=True)) if max(map(len, ids)) <= CAPTION_LENGTH]
        ids = (torch.tensor([rows[row] for row in fitting]) for rows in (clip_ids, t5_ids))
        says = [
            [-1 if said is None else said for said in (caption.concept, caption.style, caption.gender)]
            for caption in (captions[row] for row in fitting)
        ]
        return cls(*ids, *(column.contiguous() for column in torch.tensor(says).unbind(1)))


@dataclass(frozen=True)
class TrainingData:
    """Captions and pictures on the device of the training."""

    captions: Captions
    pictures: Pictures

    def to(self, device: torch.device) -> Self:
        """Move all of it."""
        captions, pictures = (
            {name: column.to(device) for name, column in vars(part).items()} for part in (self.captions, self.pictures)
        )
        return type(self)(Captions(**captions), Pictures(**pictures))

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x₀ (size, 4, 8, 8) and the token ids of captions (size / PICTURES, t).

        Caption i belongs to the pictures i, i + size / PICTURES and so on. Nothing of it waits for the device.
        """
        captions, pictures = self.captions, self.pictures
        device = captions.clip.device
        rows = torch.randint(1, len(captions.clip), (size // PICTURES,), device=device)
        shown = rows.repeat(PICTURES)
        chosen = pictures.choose(captions.concept[shown], captions.style[shown], captions.gender[shown])
        copies = pictures.mean.shape[1]
        is_centred = torch.rand(len(shown), device=device) < CENTRED_SHARE
        copy = torch.randint_like(shown, copies).masked_fill(is_centred, 0)
        mean, std = pictures.mean[chosen, copy].float(), pictures.std[chosen, copy].float()
        rows = rows.masked_fill(torch.rand(len(rows), device=device) < EMPTY_SHARE, 0)
        return mean + std * torch.randn_like(mean), captions.clip[rows], captions.t5[rows]
