"""The tokenizer: CLIP's byte-level BPE, its merges learned from the captions. Length 24, padded with the end token."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from demo.captions import sample
from demo.concepts import Concept

NAME = "tokenizer"
LENGTH = 24
MERGES = 1400
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Tokens:
    """Token ids (rows, 24) of captions, the position of the last subject token and of the end token (rows,)."""

    ids: Tensor
    subject: Tensor
    first_subject: Tensor
    end: Tensor


def train(
    concepts: Sequence[Concept], folder: Path, *, captions: int = 40_000, warm_start: Path | None = None
) -> CLIPTokenizer:
    """Learn the merges, or take those of `warm_start`, and save the tokenizer under `folder`."""
    if warm_start is not None:
        tokenizer = CLIPTokenizer.from_pretrained(warm_start, subfolder="tokenizer")
    else:
        chance = random.Random(0)
        texts = (sample(chance, concepts).text for _ in range(captions))
        tokenizer = _empty().train_new_from_iterator(texts, vocab_size=2 * 256 + MERGES + 2, show_progress=False)
    tokenizer.save_pretrained(folder / NAME)
    return tokenizer


def load(folder: Path) -> CLIPTokenizer:
    """Return the trained tokenizer. Raises FileNotFoundError naming the stage to run."""
    if not (folder / NAME).is_dir():
        raise FileNotFoundError(f"{folder} has no tokenizer; run `python -m demo.train tokenizer` first")
    return CLIPTokenizer.from_pretrained(folder / NAME)


def _empty() -> CLIPTokenizer:
    """CLIP's alphabet without merges: each byte inside a word, each byte at its end, the two special tokens."""
    alphabet = list(bytes_to_unicode().values())
    tokens = itertools.chain(alphabet, (f"{byte}</w>" for byte in alphabet), (BEGIN, END))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], bos_token=BEGIN, eos_token=END, unk_token=END, pad_token=END,
                         model_max_length=LENGTH)  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, templates: Sequence[str], subjects: Sequence[str]) -> Tokens:
    """Tokens of `template.format(subject)`, row by row, the subject found by the placeholder's place, not by its
    letters.

    Raises ValueError for a caption that does not fit.
    """
    texts = [template.format(subject) for template, subject in zip(templates, subjects, strict=True)]
    encoded = tokenizer(texts, padding="max_length", max_length=LENGTH, return_offsets_mapping=True)
    first, last, end = [], [], []
    for row, (template, subject) in enumerate(zip(templates, subjects, strict=True)):
        if len(encoded["input_ids"][row]) > LENGTH:
            raise ValueError(f"{texts[row]!r} is longer than {LENGTH} tokens; shorten the template or the subject")
        start = template.index("{}")
        stop = start + len(subject)
        spans = encoded["offset_mapping"][row]
        inside = [index for index, (left, right) in enumerate(spans) if left < right and left < stop and right > start]
        first.append(inside[0])
        last.append(inside[-1])
        end.append(sum(encoded["attention_mask"][row]) - 1)
    return Tokens(torch.tensor(encoded["input_ids"]), torch.tensor(last), torch.tensor(first), torch.tensor(end))
