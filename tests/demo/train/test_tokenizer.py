from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from demo.train import tokenizer as tokenizers
from demo.train.tokenizer import LENGTH, tokenize


def test_merges_are_learnt_and_survive_saving(tokenizer: CLIPTokenizer) -> None:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer("a Cat").input_ids
    assert ids[0] == begin and ids[-1] == end
    assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == ["a</w>", "cat</w>"]
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert len(padded) == LENGTH and padded[4:] == [end] * (LENGTH - 4)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a cat"


@pytest.mark.parametrize(
    ("template", "subject", "words"),
    [
        ("cat and {}", "cat", ["cat</w>"]),
        ("{} style cat", "cat", ["cat</w>"]),
        ("a photo of a {}, cat", "cat judge", ["cat</w>", "judge</w>"]),
    ],
)
def test_the_subject_is_found_by_its_place(
    tokenizer: CLIPTokenizer, template: str, subject: str, words: list[str]
) -> None:
    tokens = tokenize(tokenizer, [template], [subject])
    found = tokens.ids[0, tokens.first_subject[0] : tokens.subject[0] + 1].tolist()
    assert tokenizer.convert_ids_to_tokens(found) == words
    before = tokenizer(template[: template.index("{}")]).input_ids
    assert tokens.first_subject[0] == len(before) - 1
    assert tokens.ids[0, tokens.end[0]] == tokenizer.eos_token_id != tokens.ids[0, tokens.end[0] - 1]


def test_a_caption_that_does_not_fit_is_named(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ValueError, match="longer than 24 tokens"):
        tokenize(tokenizer, ["cat " * 30 + "{}"], ["cat"])


def test_missing_tokenizer_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m demo.train tokenizer"):
        tokenizers.load(tmp_path)
