"""Tokenize prompts and locate the last token of their subject. Needs `tokenizers`, not torch.

The last subject token is found by the position of the placeholder and the tokenizer's offsets, never by a text search:
"art" occurs inside "<|startoftext|>" and "work" inside "artwork", so a search would edit the wrong token.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from editing.edits import (
    Balance,
    ConceptEdit,
    Destination,
    DestinationPrompt,
    Erasure,
    check_text,
    fill_template,
    refuse_invisible,
    split_template,
)
from editing.errors import EditingError, InvalidPrompt, UnsupportedPipeline, escape_pointer
from editing.families.family import Family, PromptFormat
from editing.files import read_bytes, without_marks
from editing.tokenizer_files import EOS, find_token, read_settings, read_tokenizer, render_chat

_CLIP = PromptFormat()
_NO_LENGTH = 10**9  # transformers writes 10^30 for a tokenizer without a length
_SENTINEL = "\ue000"  # a character for private use, in place of the prompt in a chat template


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids as inference has them: with the text around the prompt and special tokens, truncated, not padded."""

    ids: tuple[int, ...]
    text_end: int
    """The position after the last token of the prompt itself. In CLIP and T5 this is the end-of-text token."""
    truncated: bool


@dataclass(frozen=True)
class SubjectPosition(TokenizedPrompt):
    """A tokenized prompt, and the index of the last token with a character of its subject."""

    last_subject_index: int

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens up to the last subject token. With causal attention, its key depends on no others."""
        return self.ids[: self.last_subject_index + 1]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a prompt before truncation."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Of each token, in the prompt's own characters."""
    prompt: tuple[int, int]
    """The first token of the prompt itself, and the one after its last."""


class PromptTokenizer:
    """Tokenizes prompts of a family as its pipeline does for its text encoder."""

    def __init__(
        self, tokenizer: Tokenizer, settings: Mapping[str, Any], *, max_length: int, format: PromptFormat = _CLIP
    ) -> None:
        """Take the settings of `tokenizer_config.json` and the number of tokens that inference reads."""
        self._tokenizer = tokenizer
        self._settings = settings
        self.format = format
        # Several edits fill the same templates with the same destinations.
        self._tokenize = lru_cache(maxsize=1024)(self._tokenize_uncached)
        self.max_length = max_length
        eos, bos = settings.get("eos_token") or EOS, settings.get("bos_token")
        self.eos_id = find_token(tokenizer, eos)
        self.pad_id = find_token(tokenizer, settings.get("pad_token") or eos)
        self.pads_left = settings.get("padding_side") == "left" and not format.pads_right
        self._ends = {self.eos_id, *(find_token(tokenizer, token) for token in (bos,) if token)}
        special = tokenizer.encode("a").special_tokens_mask  # 1 for what the tokenizer adds, such as BOS and EOS
        self._leading, self._trailing = special.index(0), special[::-1].index(0)

    @classmethod
    def from_folder(cls, folder: Path, format: PromptFormat = _CLIP) -> "PromptTokenizer":
        """Read a tokenizer's folder. Raises `UnsupportedPipeline` if it is none, or none for this format.

        If neither the format nor the tokenizer has a length, it is the number of positions of the text encoder beside
        the folder.
        """
        with without_marks(folder) as readable:
            settings = read_settings(readable)
            max_length = format.max_length or _read_length(folder, settings)
            tokenizer = read_tokenizer(readable, settings)
        if format.extend_by_prefix:
            max_length += len(tokenizer.encode(format.prefix).ids) - 2
        return cls(tokenizer, settings, max_length=max_length, format=format)

    @property
    def prefix_length(self) -> int:
        """The number of first tokens that all prompts have in common, such as the start-of-text token."""
        return self._tokenize("a").prompt[0]

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, added ones included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_whole(self, prompt: str) -> tuple[str, list[int]]:
        """Return the text that inference tokenizes, and its ids before truncation, unchecked."""
        return self._format(prompt)[0], self._tokenize(prompt).ids

    def encode(self, text: str, *, pointer: str = "") -> TokenizedPrompt:
        """Tokenize a prompt. Raises `InvalidPrompt` with `pointer`."""
        return self._truncate(self._tokenize_checked(text, pointer=pointer))

    def locate(self, template: str, subject: str, *, pointer: str = "") -> SubjectPosition:
        """Fill the template and find the subject's last token. Raises `InvalidPrompt` with `pointer`."""
        before, after = split_template(template, pointer=pointer)
        if not subject.strip():
            raise InvalidPrompt("the subject is empty", pointer=pointer)
        tokens = self._tokenize_checked(f"{before}{subject}{after}", pointer=pointer)
        start = len(self._normalize(before))
        end = start + len(self._normalize(subject.rstrip()))
        # The last token whose characters overlap the subject's characters start … end-1.
        overlapping = (i for i, (left, right) in enumerate(tokens.offsets) if left < end and right > start)
        last = max(overlapping, default=None)
        if last is None:
            raise InvalidPrompt(
                f"the tokenizer gives the subject {subject!r} no token: use another name", pointer=pointer
            )
        if last >= self.max_length - self._trailing:
            including = " including the end-of-text token" if self._trailing else ""
            raise InvalidPrompt(
                f"the subject is lost to truncation: its last token is number {last + 1}, "
                f"and the text encoder reads {self.max_length}{including}; shorten the prompt",
                pointer=pointer,
            )
        prompt = self._truncate(tokens)
        return SubjectPosition(prompt.ids, prompt.text_end, prompt.truncated, last_subject_index=last)

    def find_last_token(self, template: str, name: str, *, pointer: str = "") -> int:
        """Return the position of a name's last token, or of the token before the placeholder for an empty name.

        T5 has no token before a placeholder at the start of the prompt: its first token is meant.
        """
        if name.strip():
            return self.locate(template, name, pointer=pointer).last_subject_index
        before, _ = split_template(template)
        # Without the space before the placeholder: an erased prompt has one space where the name was.
        return max(0, self.encode(" ".join(before.split()), pointer=pointer).text_end - 1)

    def pad(self, ids: Sequence[int]) -> list[int]:
        """Pad to the full length, as inference does."""
        padding = [self.pad_id] * (self.max_length - len(ids))
        return [*padding, *ids] if self.pads_left else [*ids, *padding]

    def _tokenize_checked(self, text: str, *, pointer: str) -> _Tokens:
        check_text(text, pointer=pointer)
        tokens = self._tokenize(text)
        if self._ends & set(tokens.ids[slice(*tokens.prompt)]):
            raise InvalidPrompt("the prompt contains a start-of-text or end-of-text token: remove it", pointer=pointer)
        return tokens

    def _tokenize_uncached(self, prompt: str) -> _Tokens:
        text, start, end = self._format(prompt)
        encoding = self._tokenizer.encode(text)
        # Tokens without characters of the text, such as BOS and EOS, overlap nothing.
        offsets = [
            (-1, -1) if special else (left - start, right - start)
            for special, (left, right) in zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
        ]
        first, last = self._leading, len(offsets) - self._trailing
        if start > 0:
            first = next((i for i in range(first, last) if offsets[i][1] > 0), last)
        if end < len(text):
            last = next((i for i in range(first, last) if offsets[i][0] >= end - start), last)
        return _Tokens(encoding.ids, offsets, (first, last))

    def _format(self, prompt: str) -> tuple[str, int, int]:
        """Return the text that inference tokenizes, and where the prompt starts and ends in it.

        The start is that of the prompt's first character, also of one that the format strips.
        """
        prompt = self._normalize(prompt)
        if self.format.chat is None:
            kept = prompt.strip() if self.format.lowercase else prompt
            start = len(self.format.prefix)
            text = f"{self.format.prefix}{kept}{self.format.suffix}"
        else:
            text = render_chat(prompt, self._settings, self.format.chat)
            start = render_chat(_SENTINEL, self._settings, self.format.chat).find(_SENTINEL)
            if start < 0:
                raise UnsupportedPipeline("the tokenizer's chat template renders a message without the prompt")
            kept = prompt if text.startswith(prompt, start) else prompt.strip()
            if not text.startswith(kept, start):
                raise UnsupportedPipeline("the tokenizer's chat template changes the prompt")
        skipped = len(prompt) - len(prompt.lstrip()) if kept != prompt else 0
        return text, start - skipped, start + len(kept)

    def _normalize(self, text: str) -> str:
        return text.lower() if self.format.lowercase else text

    def _truncate(self, tokens: _Tokens) -> TokenizedPrompt:
        ids, kept = tokens.ids, self.max_length - self._trailing
        truncated = len(ids) > self.max_length
        if truncated:
            ids = [*ids[:kept], *ids[len(ids) - self._trailing :]]
        return TokenizedPrompt(tuple(ids), text_end=min(tokens.prompt[1], kept), truncated=truncated)


def _read_length(folder: Path, settings: Mapping[str, Any]) -> int:
    """Return the length of a tokenizer, or the positions of the text encoder beside it if it has none."""
    length = settings.get("model_max_length")
    if length is None or (isinstance(length, int | float) and length >= _NO_LENGTH):
        encoder = folder.parent / folder.name.replace("tokenizer", "text_encoder") / "config.json"
        length = json.loads(read_bytes(encoder)).get("max_position_embeddings") if encoder.is_file() else None
    if not isinstance(length, int) or not 3 <= length <= 4096:
        raise UnsupportedPipeline(f"{folder.name}/tokenizer_config.json has an invalid model_max_length: {length!r}")
    return length


def load_tokenizers(folder: Path, family: Family) -> tuple[PromptTokenizer, ...]:
    """Read the tokenizer of each text encoder of a pipeline, in the order in which it has them."""
    return tuple(PromptTokenizer.from_folder(folder / spec.tokenizer, spec.format) for spec in family.encoders)


def build_destination_prompts(destination: Destination, template: str) -> dict[str, float]:
    """Return the destination's prompts for this template with their shares; none for reference images."""
    match destination:
        case DestinationPrompt(prompt):
            return {fill_template(template, prompt): 1.0}
        case Erasure(neutral):
            return {" ".join(fill_template(template, neutral).split()): 1.0}
        case Balance():
            return {fill_template(template, prompt): share for prompt, share in destination.shares.items()}
        case _:
            return {}


def validate_edit(edit: ConceptEdit, tokenizers: Sequence[PromptTokenizer]) -> None:
    """Raise `InvalidPrompt` with the field's pointer if the tokenizers of a pipeline cannot take a prompt of the edit.

    An encoder may cut off the end of a prompt that another one reads whole, as CLIP beside T5, but not its subject.
    Refused too: invisible characters, and a destination that all tokenizers read as the source.
    """
    for pointer, text in _iterate_texts(edit):
        refuse_invisible(text, pointer=pointer)
    for number, tokenizer in enumerate(tokenizers, start=1):
        try:
            check_subjects(edit, tokenizer)
        except InvalidPrompt as error:
            if len(tokenizers) == 1:
                raise
            raise InvalidPrompt(f"text encoder {number}: {error.detail}", pointer=error.pointer) from error
    limit = max(tokenizer.max_length for tokenizer in tokenizers)
    for index, template in enumerate(edit.templates):
        for prompt in (fill_template(template, edit.source), *build_destination_prompts(edit.destination, template)):
            if all(tokenizer.encode(prompt).truncated for tokenizer in tokenizers):
                detail = (
                    f"the prompt {prompt[:40]!r}… is longer than the {limit} tokens that the model reads: shorten it"
                )
                raise InvalidPrompt(detail, pointer=f"/templates/{index}")
    _refuse_no_change(edit, tokenizers)


def _iterate_texts(edit: ConceptEdit) -> Iterator[tuple[str, str]]:
    """Yield the texts of an edit with their pointers."""
    yield "/source", edit.source
    yield from ((f"/templates/{index}", template) for index, template in enumerate(edit.templates))
    match edit.destination:
        case DestinationPrompt(prompt):
            yield "/destination/prompt", prompt
        case Erasure(neutral):
            yield "/destination/neutral", neutral
        case Balance(weights):
            yield from ((f"/destination/balance/{escape_pointer(prompt)}", prompt) for prompt in weights)


def _refuse_no_change(edit: ConceptEdit, tokenizers: Sequence[PromptTokenizer]) -> None:
    for template in edit.templates:
        source = fill_template(template, edit.source)
        prompts = [prompt for prompt, share in build_destination_prompts(edit.destination, template).items() if share]
        if not prompts or any(
            tokenizer.encode(prompt).ids != tokenizer.encode(source).ids
            for prompt in prompts
            for tokenizer in tokenizers
        ):
            return
    pointer = {DestinationPrompt: "/prompt", Erasure: "/neutral", Balance: "/balance"}[type(edit.destination)]
    detail = f"the model reads the destination as the source {edit.source!r}, so that the edit changes nothing"
    raise InvalidPrompt(detail, pointer="/destination" + pointer)


def check_subjects(edit: ConceptEdit, tokenizer: PromptTokenizer) -> None:
    """Raise `InvalidPrompt` with the field's pointer if this tokenizer finds no subject in one of the prompts."""
    for index, template in enumerate(edit.templates):
        pointer = f"/templates/{index}"
        tokenizer.locate(template, edit.source, pointer=pointer)
        match edit.destination:
            case DestinationPrompt(prompt):
                _locate_destination(tokenizer, template, prompt, pointer="/destination/prompt")
            case Balance(weights):
                for prompt in weights:
                    _locate_destination(
                        tokenizer, template, prompt, pointer=f"/destination/balance/{escape_pointer(prompt)}"
                    )
            case Erasure(neutral):
                tokenizer.encode(fill_template(template, neutral), pointer="/destination/neutral")


def _locate_destination(tokenizer: PromptTokenizer, template: str, prompt: str, *, pointer: str) -> None:
    try:
        tokenizer.locate(template, prompt)
    except EditingError as error:
        raise InvalidPrompt(f"in the template {template!r}: {error.detail}", pointer=pointer) from None
