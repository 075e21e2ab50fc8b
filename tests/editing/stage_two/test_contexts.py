"""Which prompts stand around a subject, and whose value is kept beside the edits'."""

from editing.edits import fill_template
from editing.pipelines import EditablePipeline
from editing.stage_two.contexts import AFTER_SUBJECT, AT_SUBJECT, around, surroundings


class TestAround:
    def test_ends_with_the_subject(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        found = list(around(tokenizer, AT_SUBJECT, "red cat"))
        assert len(found) == len(AT_SUBJECT)
        assert {prefix[-1] for prefix in found} == {tokenizer.encode("red cat").ids[-2]}

    def test_leaves_out_where_it_is_too_long(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        long = " ".join(["a"] * (tokenizer.max_length - 2))  # "a" is a token; there is room for BOS, it and EOS
        assert list(around(tokenizer, ("{}", "this is an old {}"), long)) == [tokenizer.encode(long).ids[:-1]]


class TestSurroundings:
    def test_what_follows_a_source_and_who_ends_like_it(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        found = set(surroundings(tokenizer, ["red cat", "red cat"], ["cat", "red cat", "dog"]))
        followed = {tokenizer.encode(fill_template(context, "red cat")).ids[:-1] for context in AFTER_SUBJECT}
        assert followed <= found
        assert {prefix[-1] for prefix in found - followed} == {tokenizer.encode("cat").ids[-2]}
        named = [tokenizer.locate(context, "cat").prefix for context in (AT_SUBJECT[0], AFTER_SUBJECT[0])]
        assert found >= set(named)
        assert tokenizer.locate(AT_SUBJECT[0], "dog").prefix not in found

    def test_the_source_itself_is_no_neighbour(self, pipeline: EditablePipeline) -> None:
        tokenizer = pipeline.encoder.tokenizer
        found = set(surroundings(tokenizer, ["cat"], ["cat"]))
        assert tokenizer.locate(AT_SUBJECT[0], "cat").prefix not in found
