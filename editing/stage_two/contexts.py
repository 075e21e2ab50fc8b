"""Prompts in which a value is written besides an edit's own templates, and tokens that keep their values.

The key of a name that the encoder does not know, such as "brolly" in two pieces, differs from prompt to prompt far more
than that of a known name. A value written for the mean of three templates is then often not retrieved in a fourth
prompt. With the contexts "many", stage II writes the value in each of `AT_SUBJECT` as a column of its own. It keeps the
values of the tokens after the subject in `AFTER_SUBJECT`, which the update would otherwise change too.
docs/evaluation.md has the gain and the cost.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from editing.edits import fill_template
from editing.errors import InvalidPrompt
from editing.prompts import PromptTokenizer, SubjectPosition

Contexts = Literal["own", "many"]
"""`own`: one column, the mean over the edit's templates. `many`: a column for each template and each `AT_SUBJECT`."""

AT_SUBJECT = (
    "a {}", "the {}", "my {}", "one {}", "a picture of a {}", "a drawing of the {}", "there is a {}", "a small {}",
    "a big red {}", "this is an old {}", "we saw a very nice {}", "close to the house stood a {}", "an icon of a {}",
    "what I want for my birthday is a {}", "two people talk about the {}", "in the corner of the room lies a {}",
    "some {}", "your first {}", "a sketch of his {}", "the story of a {}", "a large painting that shows a {}",
    "everybody likes the {}", "blue and green {}", "here we have a {}", "it is only a {}", "a poster with one {}",
    "three of us found the {}", "a dark photograph of some {}", "she draws a {}", "a logo made from a {}",
    "a cartoon {}", "for sale: a {}",
)  # fmt: skip

AFTER_SUBJECT = (
    "a {} in", "the {} of", "my {} with", "one {} in the", "a {} on a", "a {} at night", "a small {} on a table",
    "the {} for you", "a photo of a {} in the garden", "{} with a friend", "this {} is", "{} and",
    "the {} that we saw", "a {} by the river", "{} from above, watercolour", "one {} under the old tree",
    "two {} next to a door", "a {} made of glass", "{}, black and white", "his {} was very happy",
    "a {} without its shadow", "the {} between them", "{} as seen by a child", "a {} over the city at dawn",
)  # fmt: skip

EDIT_WEIGHT = 2.5
"""Weight of all columns of an edit together, relative to an edit with the contexts "own"."""
PRESERVE_WEIGHT = 0.25
"""Weight of each preserved column, relative to the contexts "own": there are far more of them."""


def locate_in_contexts(tokenizer: PromptTokenizer, contexts: Iterable[str], subject: str) -> Iterator[SubjectPosition]:
    """Yield the subject's position in each context that is short enough for the encoder."""
    for context in contexts:
        try:
            yield tokenizer.locate(context, subject)
        except InvalidPrompt:
            continue


def find_preserved_positions(
    tokenizer: PromptTokenizer, sources: Iterable[str], preserve: Sequence[str]
) -> Iterator[SubjectPosition]:
    """Yield positions whose tokens keep their values, besides the preserved prompts themselves.

    These are what follows each source. They are also contexts of the preserved names that end in the same token as a
    source, such as "ferris wheel" with an edit of "cogwheel". The keys of that token are near the edit's.
    """
    sources = sorted(set(sources))
    last_tokens = {tokenizer.locate("{}", source).prefix[-1] for source in sources}
    for source in sources:
        for context in AFTER_SUBJECT:
            prompt = tokenizer.encode(fill_template(context, source))
            if not prompt.truncated:
                yield SubjectPosition(prompt.ids, prompt.text_end, prompt.truncated, prompt.text_end - 1)
    for name in preserve:
        if name not in sources and tokenizer.locate("{}", name).prefix[-1] in last_tokens:
            yield from locate_in_contexts(tokenizer, (*AT_SUBJECT[::3], *AFTER_SUBJECT[::2]), name)
