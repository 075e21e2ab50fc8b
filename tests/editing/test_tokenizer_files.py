"""Tokenizers read from a folder's files, against those of transformers; chat templates; and what is refused."""

import json
import struct
from pathlib import Path

import pytest
from transformers import AutoTokenizer, T5Tokenizer

from editing.errors import InvalidPrompt, UnsupportedPipeline
from editing.families.family import PromptFormat, chat
from editing.families.qwen_image import QWEN_IMAGE
from editing.families.sana import SANA
from editing.prompts import PromptTokenizer
from tests.families import write_chat_tokenizer, write_gemma_tokenizer, write_t5_tokenizer

TEXTS = ["a cat", "", "  The OLD tree,\n in the sea! ", "naïve café 猫 🐱", "a  b", "cats eating"]
T5_FORMAT = PromptFormat(max_length=20)
CHAT = chat(enable_thinking=True)


def varint(number: int) -> bytes:
    digits = []
    while True:
        digits.append(number & 0x7F | (0x80 if number > 0x7F else 0))
        number >>= 7
        if not number:
            return bytes(digits)


def write_field(number: int, content: bytes) -> bytes:
    """Write a protobuf field of bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def write_sentencepiece(path: Path, pieces: list[tuple[str, float]]) -> None:
    """Write a SentencePiece model: pieces with text, score and kind, and a normalizer without rules."""
    model = b""
    for text, score in pieces:
        kind = varint(3 << 3) + varint(1)
        model += write_field(1, write_field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + kind)
    path.write_bytes(model + write_field(3, write_field(1, b"identity")))


class TestReadTokenizer:
    def test_sentencepiece_model_gives_the_ids_of_t5(self, tmp_path: Path) -> None:
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁cat", -3.5), ("ing", -4.0)]
        pieces += [(letter, -6.0 - index / 8) for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz,!")]
        write_sentencepiece(tmp_path / "spiece.model", pieces)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 100})
        )
        extra = [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
        expected = T5Tokenizer(vocab=[*pieces, *extra])
        tokenizer = PromptTokenizer.from_folder(tmp_path, T5_FORMAT)
        for text in TEXTS:
            assert list(tokenizer.encode(text).ids) == expected(text, truncation=True, max_length=20).input_ids
        assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 0)

    @pytest.mark.parametrize("as_two_files", [False, True])
    def test_qwen_files_give_the_ids_of_transformers(self, tmp_path: Path, as_two_files: bool) -> None:
        write_chat_tokenizer(tmp_path, as_two_files=as_two_files)
        expected = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer = PromptTokenizer.from_folder(tmp_path, PromptFormat(max_length=60))
        for text in [*TEXTS, "<|im_start|>user"]:
            assert list(tokenizer.encode(text).ids) == expected(text).input_ids

    def test_bos_is_added_where_the_settings_say_so(self, tmp_path: Path) -> None:
        write_gemma_tokenizer(tmp_path)
        tokenizer = PromptTokenizer.from_folder(tmp_path, PromptFormat(max_length=60))
        assert tokenizer.encode("a cat").ids[0] == 2
        assert tokenizer.prefix_length == 1
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
        assert PromptTokenizer.from_folder(tmp_path, PromptFormat(max_length=60)).encode("a cat").ids[0] != 2

    def test_damaged_sentencepiece_model_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text("{}")
        (tmp_path / "spiece.model").write_bytes(b"\xff\x01no model")
        with pytest.raises(UnsupportedPipeline, match="cannot be read"):
            PromptTokenizer.from_folder(tmp_path, T5_FORMAT)


class TestChatTemplate:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_chat_tokenizer(tmp_path)
        return tmp_path

    def test_text_equals_that_of_transformers(self, folder: Path) -> None:
        reference = AutoTokenizer.from_pretrained(folder)
        for thinking in (True, False):
            tokenizer = PromptTokenizer.from_folder(folder, chat(enable_thinking=thinking))
            for text in TEXTS:
                rendered = reference.apply_chat_template(
                    [{"role": "user", "content": text}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=thinking,
                )
                assert list(tokenizer.encode(text).ids) == reference(rendered).input_ids

    def test_missing_template_is_refused(self, folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(UnsupportedPipeline, match="no chat template"):
            PromptTokenizer.from_folder(folder, CHAT).encode("a cat")

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% for", "cannot be rendered"),
            ("{{ raise_exception('no users') }}", "no users"),
            ("{{ messages[0].content | upper }}", "changes the prompt"),
            ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
            ("a constant", "without the prompt"),
        ],
    )
    def test_templates_that_cannot_be_used_are_refused(self, folder: Path, template: str, message: str) -> None:
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(UnsupportedPipeline, match=message):
            PromptTokenizer.from_folder(folder, CHAT).encode("a cat")


class TestSubject:
    def test_subject_is_found_in_the_users_text_alone(self, tmp_path: Path) -> None:
        """ "star" and "user" also stand in the text around the prompt, and the template strips the prompt."""
        write_chat_tokenizer(tmp_path)
        tokenizer = PromptTokenizer.from_folder(tmp_path, CHAT)
        for subject in ("star", "user", "im"):
            for template in ("{}", "  a {} at night", "{} and a star"):
                position = tokenizer.locate(template, subject)
                reference = AutoTokenizer.from_pretrained(tmp_path)
                before, _, _ = template.partition("{}")
                text = reference.decode(position.prefix)
                assert text == f"<|im_start|>user\n{before.lstrip()}{subject}"

    def test_end_of_the_prompt_is_not_that_of_the_text_after_it(self, tmp_path: Path) -> None:
        write_chat_tokenizer(tmp_path)
        tokenizer = PromptTokenizer.from_folder(tmp_path, CHAT)
        prompt = tokenizer.encode("a b")
        reference = AutoTokenizer.from_pretrained(tmp_path)
        assert reference.decode(prompt.ids[: prompt.text_end]).endswith("a b")
        assert reference.decode(prompt.ids[prompt.text_end :]).startswith("<|im_end|>")

    def test_prefix_is_what_all_prompts_share(self, tmp_path: Path) -> None:
        write_chat_tokenizer(tmp_path)
        (spec,) = QWEN_IMAGE.encoders
        tokenizer = PromptTokenizer.from_folder(tmp_path, spec.format)
        one, two = (tokenizer.encode(text).ids for text in ("xyz", "123"))
        same = next(index for index, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1])
        assert tokenizer.prefix_length == same

    def test_lowercase_formats_find_the_subject(self, tmp_path: Path) -> None:
        """The lowercase of "İ" has two characters, and spaces at the start are lost."""
        write_gemma_tokenizer(tmp_path)
        (spec,) = SANA.encoders
        tokenizer = PromptTokenizer.from_folder(tmp_path, spec.format)
        position = tokenizer.locate("  İ {} b", "Dog")
        reference = AutoTokenizer.from_pretrained(tmp_path)
        assert reference.decode(position.prefix).endswith(" dog")

    def test_subject_lost_to_truncation_is_refused(self, tmp_path: Path) -> None:
        write_t5_tokenizer(tmp_path)
        tokenizer = PromptTokenizer.from_folder(tmp_path, T5_FORMAT)
        assert tokenizer.locate("qqqqqqqqqqqqqqqq{}", "xy").last_subject_index == 18  # and the end-of-text token
        with pytest.raises(InvalidPrompt, match="number 20, and the text encoder reads 20 including the end-of-text"):
            tokenizer.locate("qqqqqqqqqqqqqqqqq{}", "xy")

    def test_suffix_may_be_lost_to_truncation(self, tmp_path: Path) -> None:
        """As in inference: what comes after the prompt is cut first."""
        write_chat_tokenizer(tmp_path)
        format = PromptFormat(max_length=12, prefix="<|im_start|>", suffix="<|im_end|>")
        tokenizer = PromptTokenizer.from_folder(tmp_path, format)
        position = tokenizer.locate("{}", "abcdefghijk")
        assert position.truncated
        assert position.last_subject_index == 11 == position.text_end - 1
        with pytest.raises(InvalidPrompt, match="number 13, and the text encoder reads 12;"):
            tokenizer.locate("{}", "abcdefghijkl")

    def test_end_of_text_in_a_prompt_is_refused(self, tmp_path: Path) -> None:
        write_t5_tokenizer(tmp_path)
        with pytest.raises(InvalidPrompt, match="end-of-text"):
            PromptTokenizer.from_folder(tmp_path, T5_FORMAT).encode("a </s> b")
