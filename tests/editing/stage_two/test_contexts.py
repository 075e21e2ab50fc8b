"""The contexts of a subject, and the prefixes whose values are preserved."""

from editing.edits import fill_template
from editing.pipelines import EditablePipeline
from editing.stage_two.contexts import AFTER_SUBJECT, AT_SUBJECT, find_preserved_positions, locate_in_contexts


class TestLocateInContexts:
    def test_prefixes_end_with_the_subject(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        found = list(locate_in_contexts(tokenizer, AT_SUBJECT, "red cat"))
        assert len(found) == len(AT_SUBJECT)
        assert {position.prefix[-1] for position in found} == {tokenizer.encode("red cat").ids[-2]}

    def test_contexts_that_are_too_long_are_left_out(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        long = " ".join(["a"] * (tokenizer.max_length - 2))  # "a" is one token; BOS and EOS fill the rest
        (position,) = locate_in_contexts(tokenizer, ("{}", "this is an old {}"), long)
        assert position.prefix == tokenizer.encode(long).ids[:-1]


class TestFindPreservedPositions:
    def test_preserves_what_follows_a_source_and_names_with_its_last_token(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        positions = find_preserved_positions(tokenizer, ["red cat", "red cat"], ["cat", "red cat", "dog"])
        found = {position.prefix for position in positions}
        followed = {tokenizer.encode(fill_template(context, "red cat")).ids[:-1] for context in AFTER_SUBJECT}
        assert followed <= found
        assert {prefix[-1] for prefix in found - followed} == {tokenizer.encode("cat").ids[-2]}
        named = [tokenizer.locate(context, "cat").prefix for context in (AT_SUBJECT[0], AFTER_SUBJECT[0])]
        assert found >= set(named)
        assert tokenizer.locate(AT_SUBJECT[0], "dog").prefix not in found

    def test_source_itself_is_not_preserved(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        found = {position.prefix for position in find_preserved_positions(tokenizer, ["cat"], ["cat"])}
        assert tokenizer.locate(AT_SUBJECT[0], "cat").prefix not in found
