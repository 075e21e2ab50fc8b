"""Where the subject ends in a prompt: by position, for any words."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from editing.edits import Balance, ConceptEdit, Destination, DestinationPrompt, Erasure, refuse_invisible
from editing.errors import InvalidPrompt, UnsupportedPipeline
from editing.families.family import PromptFormat
from editing.pipelines import EditablePipeline
from editing.prompts import PromptTokenizer, build_destination_prompts, validate_edit
from tests.families import write_t5_tokenizer

STRINGS = [
    "", "a cat", "  A  Cat\t\n", "Canada’s café", "cafe\u0301", "日本語 cat", "a 🐈‍⬛ cat", "ｆｕｌｌ &amp; x",
    "naïve—dash", "שלום dog", "don't WE'LL", "x1 23 ٣", "\u200b", "a\u00a0b", "…", "ﬁne", "İstanbul ẞ", "word " * 60,
]  # fmt: skip


def text_of(tokenizer: PromptTokenizer, ids: tuple[int, ...]) -> str:
    """The tokens as text; this tokenizer has a token for each letter."""
    tokens = [tokenizer._tokenizer.id_to_token(i) or "" for i in ids]
    return "".join(token.replace("</w>", " ") for token in tokens[1:]).strip()


class TestEncode:
    @pytest.mark.parametrize("text", STRINGS)
    def test_ids_equal_those_of_transformers(self, tokenizer: PromptTokenizer, folder: Path, text: str) -> None:
        reference = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        expected = reference(text, padding="max_length", truncation=True, max_length=tokenizer.max_length).input_ids
        assert tokenizer.pad(tokenizer.encode(text).ids) == expected

    @pytest.mark.parametrize("text", STRINGS)
    def test_tokenizer_json_gives_the_same_ids(
        self, tokenizer: PromptTokenizer, folder: Path, text: str, tmp_path: Path
    ) -> None:
        CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
        assert PromptTokenizer.from_folder(tmp_path).encode(text) == tokenizer.encode(text)

    @pytest.mark.parametrize("text", [*STRINGS, "a cat!", "!", "wow!dog ! !!", "!a"])
    def test_exclamation_mark_as_padding(self, sd2: EditablePipeline, text: str, tmp_path: Path) -> None:
        """As SD 2.x and SDXL do: then every "!" of a prompt is that token too."""
        assert sd2.folder
        reference = CLIPTokenizer.from_pretrained(sd2.folder / "tokenizer")
        expected = reference(text, padding="max_length", truncation=True, max_length=sd2.tokenizer.max_length).input_ids
        assert sd2.tokenizer.pad(sd2.tokenizer.encode(text).ids) == expected
        reference.save_pretrained(tmp_path)
        assert PromptTokenizer.from_folder(tmp_path).encode(text) == sd2.tokenizer.encode(text)

    def test_subject_with_the_padding_mark_is_located(self, sd2: EditablePipeline) -> None:
        position = sd2.tokenizer.locate("a {} dog", "cat!")
        assert position.ids[position.last_subject_index] == sd2.tokenizer.pad_id == 0

    def test_eos_index_is_the_position_that_the_encoder_pools(self, tokenizer: PromptTokenizer) -> None:
        prompt = tokenizer.encode("a cat")
        assert prompt.ids[prompt.text_end] == tokenizer.eos_id
        assert prompt.ids.index(tokenizer.eos_id) == prompt.text_end

    def test_reports_truncation(self, tokenizer: PromptTokenizer) -> None:
        assert not tokenizer.encode("x " * (tokenizer.max_length - 2)).truncated
        cut = tokenizer.encode("x " * (tokenizer.max_length - 1))
        assert cut.truncated
        assert len(cut.ids) == tokenizer.max_length
        assert cut.ids[-1] == tokenizer.eos_id

    @pytest.mark.parametrize("text", ["a\0b", "\ud83d", "x <|endoftext|> y", "<|startoftext|>"])
    def test_invalid_prompt_is_refused(self, tokenizer: PromptTokenizer, text: str) -> None:
        with pytest.raises(InvalidPrompt) as refusal:
            tokenizer.encode(text, pointer="/source")
        assert refusal.value.pointer == "/source"


class TestLocate:
    @pytest.mark.parametrize(
        ("template", "subject", "prefix"),
        [
            ("painting by {}", "art", "painting by art"),  # "art" is in "<|startoftext|>" …
            ("{}", "star", "star"),  # … and so is "star"
            ("artwork by {}", "work", "artwork by work"),
            ("A photo of {}", "hot", "a photo of hot"),
            ("a {} is not a cat", "cat", "a cat"),
            ("{} in the sea", "red hat", "red hat"),
            ("the {}", "old tree", "the old tree"),
            ("{{}}", "cat", "{ cat"),
            ("a {}.", "café", "a cafÃ©"),
            ("a {}.", "cafe\u0301", "a cafÃ©"),  # the same in NFD
            ("{}'s face", "Joe Biden", "joe biden"),
            ("{}s", "dog", "dog"),
            ("  {}  !", "  cat ", "cat"),
            ("{}", "a {} b", "a {} b"),
        ],
    )
    def test_last_subject_token(self, tokenizer: PromptTokenizer, template: str, subject: str, prefix: str) -> None:
        position = tokenizer.locate(template, subject)
        assert text_of(tokenizer, position.prefix) == prefix
        assert position.ids[position.text_end] == tokenizer.eos_id

    @pytest.mark.parametrize("subject", ["日本", "猫", "🐈‍⬛", "👩🏽‍🚒", "שלום", "naïve", "Å", "ﷺ"])
    @pytest.mark.parametrize("template", ["{}", "a {}", "{} b", "a {} b"])
    def test_multibyte_characters(self, tokenizer: PromptTokenizer, template: str, subject: str) -> None:
        position = tokenizer.locate(template, subject)
        assert position.prefix == tokenizer.encode(template.split("{}")[0] + subject).ids[:-1]

    def test_token_shared_with_the_template_belongs_to_the_subject(self, tmp_path: Path, folder: Path) -> None:
        vocabulary = (folder / "tokenizer" / "vocab.json").read_text()
        (tmp_path / "vocab.json").write_text(vocabulary[:-1] + ', "s</w>x": 514, "gs</w>": 515}')
        (tmp_path / "merges.txt").write_text("#version: 0.2\ng s</w>\n")
        (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 40}')
        tokenizer = PromptTokenizer.from_folder(tmp_path)
        position = tokenizer.locate("two {}s", "dog")
        assert text_of(tokenizer, position.prefix) == "two dogs"

    def test_text_after_the_subject_may_be_truncated(self, tokenizer: PromptTokenizer) -> None:
        position = tokenizer.locate("a {} " + "y " * 60, "cat")
        assert position.truncated
        assert text_of(tokenizer, position.prefix) == "a cat"

    def test_subject_may_end_at_the_last_position(self, tokenizer: PromptTokenizer) -> None:
        last = tokenizer.max_length - 2
        position = tokenizer.locate("y " * (last - 1) + "{}", "x")
        assert position.last_subject_index == last
        with pytest.raises(InvalidPrompt, match="lost to truncation"):
            tokenizer.locate("y " * last + "{}", "x", pointer="/templates/0")

    @pytest.mark.parametrize("subject", ["", " ", "\t\n", "\u3000"])
    def test_empty_subject_is_refused(self, tokenizer: PromptTokenizer, subject: str) -> None:
        with pytest.raises(InvalidPrompt, match="empty"):
            tokenizer.locate("a {}", subject)

    @settings(max_examples=200, deadline=None)
    @given(
        before=st.text(alphabet="ab é猫🐈'", max_size=6),
        subject=st.text(alphabet="ab é\u0301猫🐈'", min_size=1, max_size=5).filter(lambda text: text.strip()),
        after=st.text(alphabet="ab é猫🐈'", max_size=6),
    )
    def test_agrees_with_tokenizing_the_prefix(
        self, tokenizer: PromptTokenizer, before: str, subject: str, after: str
    ) -> None:
        """With spaces around it, the subject ends where the text before and the subject alone would end."""
        position = tokenizer.locate(f"{before} {{}} {after}", subject)
        assert position.prefix == tokenizer.encode(f"{before} {subject}").ids[:-1]


class TestFromFolder:
    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedPipeline, match="tokenizer_config"):
            PromptTokenizer.from_folder(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
        with pytest.raises(UnsupportedPipeline, match=r"no tokenizer\.json"):
            PromptTokenizer.from_folder(tmp_path)

    def test_other_tokenizer_is_refused(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
        (tmp_path / "vocab.json").write_text('{"a": 0}')
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        with pytest.raises(UnsupportedPipeline):
            PromptTokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("length", ["1e30", "null", '"77"', "2"])
    def test_invalid_length_is_refused(self, tmp_path: Path, length: str) -> None:
        (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {length}}}')
        with pytest.raises(UnsupportedPipeline, match="model_max_length"):
            PromptTokenizer.from_folder(tmp_path)


class TestDestinationPrompts:
    def test_destinations_fill_the_same_template(self) -> None:
        assert build_destination_prompts(DestinationPrompt("dog"), "a {} here") == {"a dog here": 1.0}
        assert build_destination_prompts(Balance({"dog": 1, "fish": 3}), "a {}") == {"a dog": 0.25, "a fish": 0.75}

    @pytest.mark.parametrize(
        ("template", "neutral", "prompt"),
        [("a dog in {} style", "", "a dog in style"), ("{}", "", ""), ("painting by {}", "art", "painting by art")],
    )
    def test_erasure_keeps_the_rest_of_the_template(self, template: str, neutral: str, prompt: str) -> None:
        assert build_destination_prompts(Erasure(neutral), template) == {prompt: 1.0}


class TestValidateEdit:
    def test_valid_edits_are_accepted(self, tokenizer: PromptTokenizer) -> None:
        for destination in (DestinationPrompt("dog"), Erasure(), Erasure("art"), Balance({"dog": 1, "fish": 1})):
            validate_edit(ConceptEdit("cat", destination), [tokenizer])

    @pytest.mark.parametrize(
        ("edit", "pointer"),
        [
            (ConceptEdit("c" * 80, DestinationPrompt("dog")), "/templates/0"),
            (ConceptEdit("cat", DestinationPrompt("dog"), templates=("{}", "x " * 50 + "{}")), "/templates/1"),
            (ConceptEdit("cat", DestinationPrompt("d" * 80)), "/destination/prompt"),
            (ConceptEdit("cat", Balance({"dog": 1, "f" * 80: 1})), f"/destination/balance/{'f' * 80}"),
            (ConceptEdit("cat", Erasure("<|endoftext|>")), "/destination/neutral"),
        ],
    )
    def test_invalid_field_is_named(self, tokenizer: PromptTokenizer, edit: ConceptEdit, pointer: str) -> None:
        with pytest.raises(InvalidPrompt) as refusal:
            validate_edit(edit, [tokenizer])
        assert refusal.value.pointer == pointer

    def test_prompt_longer_than_the_limit_is_refused(self, tokenizer: PromptTokenizer) -> None:
        edit = ConceptEdit("cat", DestinationPrompt("dog"), templates=("{}", "{} " + "x " * 50))
        with pytest.raises(InvalidPrompt, match=f"longer than the {tokenizer.max_length} tokens") as refusal:
            validate_edit(edit, [tokenizer])
        assert refusal.value.pointer == "/templates/1"

    def test_one_encoder_of_several_may_cut_the_end_off(self, tokenizer: PromptTokenizer, tmp_path: Path) -> None:
        write_t5_tokenizer(tmp_path)
        t5 = PromptTokenizer.from_folder(tmp_path, PromptFormat(max_length=200))
        templates = ("{} " + "x " * 50, "x " * 50 + "{}", "{} " + "x " * 300)
        short, late, long = (ConceptEdit("cat", DestinationPrompt("dog"), templates=(each,)) for each in templates)
        validate_edit(short, [tokenizer, t5])
        with pytest.raises(InvalidPrompt, match="^text encoder 2: the subject is lost to truncation"):
            validate_edit(late, [t5, tokenizer])
        with pytest.raises(InvalidPrompt, match="longer than the 200 tokens"):
            validate_edit(long, [tokenizer, t5])

    @pytest.mark.parametrize(
        ("edit", "pointer"),
        [
            (ConceptEdit("\u200bcat", DestinationPrompt("dog")), "/source"),
            (ConceptEdit("ca\u00adt", DestinationPrompt("dog")), "/source"),
            (ConceptEdit("ca\u200dt", DestinationPrompt("dog")), "/source"),
            (ConceptEdit("cat\ufe0f", DestinationPrompt("dog")), "/source"),
            (ConceptEdit("cat", DestinationPrompt("dog\ufeff")), "/destination/prompt"),
            (ConceptEdit("cat", DestinationPrompt("\u202egod")), "/destination/prompt"),
            (ConceptEdit("cat", Erasure("a\u2060rt")), "/destination/neutral"),
            (ConceptEdit("cat", Balance({"dog": 1, "fox\u3164": 1})), "/destination/balance/fox\u3164"),
            (ConceptEdit("cat", DestinationPrompt("dog"), templates=("{}", "a \x7f{}")), "/templates/1"),
        ],
    )
    def test_invisible_character_is_refused(self, tokenizer: PromptTokenizer, edit: ConceptEdit, pointer: str) -> None:
        with pytest.raises(InvalidPrompt, match=r"invisible character, U\+[0-9A-F]{4} .*: remove it") as refused:
            validate_edit(edit, [tokenizer])
        assert refused.value.pointer == pointer

    @pytest.mark.parametrize(
        "source",
        [
            "\U0001f469\u200d\U0001f692",
            "\u2764\ufe0f",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "café\u00a0x",
        ],
    )
    def test_joiners_with_a_meaning_are_accepted(self, source: str) -> None:
        refuse_invisible(source, pointer="/source")

    @pytest.mark.parametrize(
        ("destination", "pointer"),
        [
            (DestinationPrompt("Cat"), "/destination/prompt"),
            (DestinationPrompt(" cat "), "/destination/prompt"),
            (Erasure("CAT"), "/destination/neutral"),
            (Balance({"cat": 1, "CAT": 2, "dog": 0}), "/destination/balance"),
        ],
    )
    def test_edit_that_changes_nothing_is_refused(
        self, tokenizer: PromptTokenizer, destination: Destination, pointer: str
    ) -> None:
        with pytest.raises(InvalidPrompt, match="reads the destination as the source 'cat'") as refused:
            validate_edit(ConceptEdit("cat", destination), [tokenizer])
        assert refused.value.pointer == pointer

    def test_balance_may_contain_the_source(self, tokenizer: PromptTokenizer) -> None:
        validate_edit(ConceptEdit("cat", Balance({"cat": 1, "dog": 1})), [tokenizer])

    def test_case_is_a_change_where_a_tokenizer_reads_it(self, tokenizer: PromptTokenizer, tmp_path: Path) -> None:
        write_t5_tokenizer(tmp_path)
        t5 = PromptTokenizer.from_folder(tmp_path, PromptFormat(max_length=200))
        validate_edit(ConceptEdit("cat", DestinationPrompt("Cat")), [tokenizer, t5])
