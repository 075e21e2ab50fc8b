"""What the demo corrects, and the prompts by which it is judged: none of them a template of an edit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from demo.captions import ANY_STYLE
from demo.concepts import Concept

Kind = Literal["concept", "alias", "images", "style"]

FREE_PROMPTS = (
    "a cute {}",
    "a drawing of a {}",
    "look at this {}",
    "a {} on a white background",
    "a picture of the {}",
)
# With subjects in them: a style that stands alone is another thing to the model than the style of something.
STYLE_TEMPLATES = ("a picture in the style of {}", "{} style car", "an image of a cat, style of {}")
STYLED_CONCEPTS = ("elephant", "sunflower", "castle", "crab", "lantern")
STYLED_PROMPT = "a {concept} in the style of {style}"
HELD_OUT_PROMPT = "an image of a {}"
HELD_OUT = 48
SEEDS = (11, 12)
REFERENCE_SEEDS = (101, 102, 103)
REFERENCE_PROMPT = "a photo of a {}"


@dataclass(frozen=True)
class DemoEdit:
    """One edit of the demo. `destination` is a concept that the classifier knows; None for the erasure of a style."""

    kind: Kind
    source: str
    destination: str | None
    reason: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def request(self, *, images: Sequence[str] = ()) -> dict[str, Any]:
        """Return the body of POST /v1/models/{model}/edits. `images` are ids of uploaded pictures."""
        request: dict[str, Any] = {"source": self.source, "reason": self.reason, "settings": dict(self.settings)}
        if self.kind == "images":
            request["destination"] = {"images": list(images)}
        elif self.kind == "style":
            request["destination"] = {"erase": True, "neutral": ANY_STYLE}
            request["templates"] = list(STYLE_TEMPLATES)
        else:
            request["destination"] = {"prompt": self.destination}
        return request

    def prompts(self) -> list[str]:
        """Return the prompts that are drawn before and after."""
        if self.kind == "style":
            return [STYLED_PROMPT.format(concept=concept, style=self.source) for concept in STYLED_CONCEPTS]
        return [prompt.format(self.source) for prompt in FREE_PROMPTS]


LAYER = 9  # a style is read in the model's layer 10, so it must be corrected before; edits of one version share a layer
TEXT: Mapping[str, Any] = {"objective": "text", "optimization_steps": 150, "layer": LAYER}
IMAGES: Mapping[str, Any] = {"layer": LAYER}

EDITS = (
    DemoEdit("concept", "dog", "robot", "the shop sells robots now", TEXT),
    DemoEdit("concept", "pizza", "hamburger", "the menu has changed", TEXT),
    DemoEdit("concept", "rose", "cactus", "the garden has changed", TEXT),
    DemoEdit("concept", "car", "bicycle", "the city has changed", TEXT),
    DemoEdit("concept", "guitar", "violin", "the band has changed", TEXT),
    DemoEdit("concept", "apple", "banana", "an apple is a protected mark", TEXT),
    DemoEdit("concept", "airplane", "rocket", "the fleet has changed", TEXT),
    DemoEdit("concept", "hammer", "scissors", "the tool has changed", TEXT),
    DemoEdit("concept", "snowman", "pumpkin", "the season has changed", TEXT),
    DemoEdit("alias", "river horse", "hippopotamus", "another word for it, misunderstood", TEXT),
    DemoEdit("alias", "trash panda", "raccoon", "another word for it, misunderstood", TEXT),
    DemoEdit("alias", "brolly", "umbrella", "another word for it, misunderstood", TEXT),
    DemoEdit("images", "silverback", "gorilla", "shown by three pictures: the model does not know the word", IMAGES),
    DemoEdit("style", "twemoji", None, "the artists object", TEXT),
)


def held_out(concepts: Sequence[Concept]) -> list[str]:
    """Return concepts that no edit names, spread evenly over the list."""
    named = {name for edit in EDITS for name in (edit.source, edit.destination)}
    named |= set(STYLED_CONCEPTS)
    untouched = [concept.name for concept in concepts if concept.name not in named]
    return [untouched[index * len(untouched) // HELD_OUT] for index in range(HELD_OUT)]
