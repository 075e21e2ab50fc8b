"""Compare a model's tokenizers with those of transformers, on the model's own folder."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from editing.errors import UnsupportedPipeline
from editing.families.family import Family
from editing.families.layout import read_json
from editing.files import without_marks
from editing.inspection.components import find_tokenizer_class
from editing.prompts import PromptTokenizer

PROBES = (
    "a photo of a cat", "", "  The OLD tree,\n in the sea! ", "naïve café 猫 🐱 İstanbul e\u0301",
    "it's 1,234 <b>cats</b>", "a very long cat " * 40,
)  # fmt: skip
MAX_ADDED_TOKENS = 2_000


def check_tokenizers(folder: Path, family: Family) -> None:
    """Raise `UnsupportedPipeline` if a tokenizer gives other ids than that of transformers on the same folder.

    A SentencePiece model alone is compared if the library `sentencepiece` is there, which transformers needs for it.
    """
    index = read_json(folder / "model_index.json")
    for spec in family.encoders:
        kind: Any = find_tokenizer_class(index[spec.tokenizer], spec.tokenizer)
        if not _is_readable(folder / spec.tokenizer):
            continue
        with without_marks(folder / spec.tokenizer) as readable:
            try:
                reference = kind.from_pretrained(readable, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # libraries raise many kinds for wrong files
                raise UnsupportedPipeline(f"{spec.tokenizer}/ cannot be read as a {kind.__name__}: {error}") from error
        for format in filter(None, (spec.format, spec.negative)):
            ours = PromptTokenizer.from_folder(folder / spec.tokenizer, format)
            _compare(ours, reference, name=spec.tokenizer)


def _is_readable(folder: Path) -> bool:
    """Return whether transformers can read the tokenizer in this environment."""
    files = ("tokenizer.json", "vocab.json")
    return any((folder / name).is_file() for name in files) or find_spec("sentencepiece") is not None


def _compare(ours: PromptTokenizer, reference: Any, *, name: str) -> None:
    added = sorted(reference.get_added_vocab(), key=reference.get_added_vocab().get)
    if len(added) > MAX_ADDED_TOKENS:
        raise UnsupportedPipeline(f"{name}/ has {len(added)} added tokens: at most {MAX_ADDED_TOKENS} are compared")
    for prompt in (*PROBES, *(f"a {token} in the sun" for token in added)):
        text, ids = ours.encode_whole(prompt)
        if ours.format.chat is not None:
            expected = reference.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, **ours.format.chat
            )
            if text != expected:
                raise UnsupportedPipeline(f"{name}/ has a chat template that transformers renders otherwise")
        theirs: Sequence[int] = reference(text).input_ids
        if list(theirs) != ids:
            shown = next((token for token in added if token in prompt), prompt[:40])
            raise UnsupportedPipeline(
                f"{name}/ gives other tokens than a {type(reference).__name__} of transformers for {shown!r}: save the "
                "tokenizer again with save_pretrained"
            )
