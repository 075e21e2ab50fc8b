"""Prompts around a subject that no edit names: where an edit is to hold besides its templates, and what is to stay.

What a text encoder's memories read at a name that it does not know, "brolly" in two pieces, differs from prompt to
prompt far more than at a name that it knows; so a value written for the mean of three templates is often not found from
a fourth. With "many" contexts stage II asks for it in each of `AT_SUBJECT` by a column of its own, and asks nothing of
what follows the subject in `AFTER_SUBJECT`, which would else take a part of the update. docs/evaluation.md has what
that gives, and costs.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from editing.edits import fill_template
from editing.errors import InvalidPrompt
from editing.prompts import PromptTokenizer

Contexts = Literal["own", "many"]
"""An edit's own templates, their mean as one column; or these and `AT_SUBJECT`, each a column."""

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

WEIGHT = 2.5
"""Of all columns of an edit together, where an edit by its own templates weighs one."""
KEPT = 0.25
"""Of what is preserved, each, where it weighs one beside an edit by its own templates: there is far more of it."""


def around(tokenizer: PromptTokenizer, contexts: Iterable[str], subject: str) -> Iterator[tuple[int, ...]]:
    """The subject's prefix in each of the contexts in which it is not too long for the encoder."""
    for context in contexts:
        try:
            yield tokenizer.locate(context, subject).prefix
        except InvalidPrompt:
            continue


def surroundings(
    tokenizer: PromptTokenizer, sources: Iterable[str], preserve: Sequence[str]
) -> Iterator[tuple[int, ...]]:
    """Prefixes whose last token is to keep its value besides the preserved prompts: what follows each source; and those
    of preserved names that end in the same token as a source ("ferris wheel" beside an edit of "cogwheel"), since that
    token's key is found by the edit's."""
    sources = sorted(set(sources))
    ends = {tokenizer.locate("{}", source).prefix[-1] for source in sources}
    for source in sources:
        for context in AFTER_SUBJECT:
            prompt = tokenizer.encode(fill_template(context, source))
            if not prompt.truncated:
                yield prompt.ids[: prompt.eos_index]
    for name in preserve:
        if name not in sources and tokenizer.locate("{}", name).prefix[-1] in ends:
            yield from around(tokenizer, (*AT_SUBJECT[::3], *AFTER_SUBJECT[::2]), name)
