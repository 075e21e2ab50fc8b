"""Tokenize prompts and locate the last token of their subject. Needs `tokenizers`, not torch.

The last subject token is found by the position of the placeholder and the tokenizer's offsets, never by a text search:
"art" occurs inside "<|startoftext|>" and "work" inside "artwork", so a search would edit the wrong token.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from editing.edits import (
    Balance,
    ConceptEdit,
    Destination,
    DestinationPrompt,
    Erasure,
    check_text,
    fill_template,
    split_template,
)
from editing.errors import EditingError, InvalidPrompt, UnsupportedPipeline, escape_pointer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids with BOS and EOS, truncated as inference truncates them, not padded."""

    ids: tuple[int, ...]
    eos_index: int
    truncated: bool


@dataclass(frozen=True)
class SubjectPosition(TokenizedPrompt):
    """A tokenized prompt, and the index of the last token with a character of its subject."""

    last_subject_index: int

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens up to the last subject token. Attention is causal: its key depends on no others."""
        return self.ids[: self.last_subject_index + 1]


class PromptTokenizer:
    """CLIP's byte-pair tokenizer: the ids that `transformers.CLIPTokenizer` gives for the same folder."""

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, pad_token: str = EOS) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # Several edits fill the same templates with the same destinations.
        self._tokenize = lru_cache(maxsize=1024)(self._tokenize_uncached)
        self.max_length = max_length
        self.bos_id, self.eos_id, self.pad_id = (_token_id(tokenizer, token) for token in (BOS, EOS, pad_token))

    @classmethod
    def from_folder(cls, folder: Path) -> "PromptTokenizer":
        """Read `tokenizer.json`, or `vocab.json` and `merges.txt`; the length from `tokenizer_config.json`."""
        settings = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:  # older transformers name SD 2.x's padding "!" in another file
            settings |= _read_json(folder / "special_tokens_map.json", missing={})
        pad = settings.get("pad_token", EOS)
        pad_token = str(pad["content"] if isinstance(pad, dict) else pad)
        max_length = settings.get("model_max_length")
        if not isinstance(max_length, int) or not 3 <= max_length <= 4096:
            raise UnsupportedPipeline(f"tokenizer_config.json has an invalid model_max_length: {max_length!r}")
        try:
            if (folder / "tokenizer.json").is_file():
                tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                tokenizer = _build_clip_tokenizer(folder / "vocab.json", folder / "merges.txt")
            # As in CLIPTokenizer: if "!" is the padding, every "!" of a prompt becomes that special token.
            tokenizer.add_special_tokens([AddedToken(pad_token, special=True, normalized=False)])
        except Exception as error:  # tokenizers raises bare Exception
            raise UnsupportedPipeline(f"the tokenizer in {folder.name}/ cannot be read: {error}") from error
        return cls(tokenizer, max_length=max_length, pad_token=pad_token)

    def encode(self, text: str, *, pointer: str = "") -> TokenizedPrompt:
        """Tokenize a prompt. Raises `InvalidPrompt` with `pointer`."""
        ids, _ = self._tokenize_checked(text, pointer=pointer)
        return self._truncate(ids)

    def locate(self, template: str, subject: str, *, pointer: str = "") -> SubjectPosition:
        """Fill the template and find the subject's last token. Raises `InvalidPrompt` with `pointer`."""
        before, after = split_template(template, pointer=pointer)
        if not subject.strip():
            raise InvalidPrompt("the subject is empty", pointer=pointer)
        ids, offsets = self._tokenize_checked(f"{before}{subject}{after}", pointer=pointer)
        start = len(before)
        end = start + len(subject.rstrip())
        # The last token whose characters overlap the subject's characters start … end-1.
        last = max((i for i, (left, right) in enumerate(offsets) if left < end and right > start), default=None)
        if last is None:
            raise InvalidPrompt(
                f"the tokenizer gives the subject {subject!r} no token: use another name", pointer=pointer
            )
        if last > self.max_length - 2:  # the last position belongs to EOS
            raise InvalidPrompt(
                f"the subject is lost to truncation: its last token is number {last + 1}, "
                f"and the text encoder reads {self.max_length} including the end-of-text token; shorten the prompt",
                pointer=pointer,
            )
        prompt = self._truncate(ids)
        return SubjectPosition(prompt.ids, prompt.eos_index, prompt.truncated, last_subject_index=last)

    def pad(self, ids: tuple[int, ...]) -> list[int]:
        """Pad to the full length, as inference does."""
        return [*ids, *[self.pad_id] * (self.max_length - len(ids))]

    def _tokenize_checked(self, text: str, *, pointer: str) -> tuple[list[int], list[tuple[int, int]]]:
        check_text(text, pointer=pointer)
        ids, offsets = self._tokenize(text)
        if {self.bos_id, self.eos_id} & set(ids[1:-1]):
            raise InvalidPrompt("the prompt contains a start-of-text or end-of-text token: remove it", pointer=pointer)
        return ids, offsets

    def _tokenize_uncached(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text)
        return encoding.ids, encoding.offsets

    def _truncate(self, ids: list[int]) -> TokenizedPrompt:
        kept = ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], self.eos_id]
        return TokenizedPrompt(tuple(kept), eos_index=len(kept) - 1, truncated=len(ids) > self.max_length)


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


def validate_edit(edit: ConceptEdit, tokenizer: PromptTokenizer) -> None:
    """Raise `InvalidPrompt` with the field's pointer if this tokenizer cannot take a prompt of the edit."""
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


def _read_json(path: Path, *, missing: dict[str, object] | None = None) -> dict[str, object]:
    if missing is not None and not path.is_file():
        return missing
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedPipeline(f"{path.parent.name}/ has no readable {path.name}") from error
    if not isinstance(settings, dict):
        raise UnsupportedPipeline(f"{path.parent.name}/{path.name} is no JSON object")
    return settings


def _build_clip_tokenizer(vocabulary: Path, merges: Path) -> Tokenizer:
    """Build CLIP's tokenizer from its two files, as SD 1.x has it."""
    tokenizer = Tokenizer(
        models.BPE.from_file(
            str(vocabulary),
            str(merges),
            unk_token=EOS,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, _token_id(tokenizer, EOS)), (BOS, _token_id(tokenizer, BOS)), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    return tokenizer


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise UnsupportedPipeline(f"the tokenizer has no token {token!r}: it is not CLIP's")
    return token_id
