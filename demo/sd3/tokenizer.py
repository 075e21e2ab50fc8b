"""The tokenizers: the emoji model's for both CLIPs, and one of T5's kind for T5, built of our captions."""

import math
import re
from collections import Counter
from collections.abc import Iterable

from transformers import CLIPTokenizer, T5TokenizerFast

from demo.concepts import WEIGHTS

SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's own, at its own ids
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-()&/"
LETTER_SCORE = -20.0  # below every word's, so that a known word is never spelled


def load_clip_tokenizer() -> CLIPTokenizer:
    """Return the emoji model's tokenizer. It pads to 24 tokens."""
    return CLIPTokenizer.from_pretrained(WEIGHTS / "pipeline" / "tokenizer", local_files_only=True)


def build_t5_tokenizer(captions: Iterable[str]) -> T5TokenizerFast:
    """Return a unigram tokenizer of every word of the captions; it spells any other word.

    A word's score is the logarithm of its frequency, as SentencePiece's unigram model has it.
    """
    counts = Counter(word for caption in captions for word in re.findall(r"\w+", caption))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = [
        *((token, 0.0) for token in SPECIAL),
        ("▁", LETTER_SCORE / 2),
        *((f"▁{word}", math.log(counts[word] / counts.total())) for word in words),
        *((letter, LETTER_SCORE) for letter in LETTERS),
    ]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)
