from pathlib import Path

from transformers import AutoTokenizer, T5TokenizerFast

from editing.families.sd3 import SD3
from editing.prompts import PromptTokenizer


def test_a_known_word_is_one_token_and_another_is_spelled(t5_tokenizer: T5TokenizerFast) -> None:
    assert t5_tokenizer.tokenize("a red fox!") == ["▁a", "▁red", "▁fox", "!"]
    assert t5_tokenizer.tokenize("a zig") == ["▁a", "▁", "z", "i", "g"]


def test_ids_end_with_the_end_token_and_padding_as_those_of_t5(t5_tokenizer: T5TokenizerFast) -> None:
    ids = t5_tokenizer("a fox", padding="max_length", max_length=6).input_ids
    assert ids[2:] == [1, 0, 0, 0]


def test_the_saved_tokenizer_is_that_of_the_library_and_of_the_engine(
    t5_tokenizer: T5TokenizerFast, tmp_path: Path
) -> None:
    t5_tokenizer.save_pretrained(tmp_path)
    ids = t5_tokenizer("A photo of a fox, zig!").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path)("A photo of a fox, zig!").input_ids == ids
    engine = PromptTokenizer.from_folder(tmp_path, SD3.find_encoder("text_encoder_3").format)
    assert list(engine.encode("A photo of a fox, zig!").ids) == ids
