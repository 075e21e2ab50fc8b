"""An edit: its source, its destination, and the settings of stage I. Free of torch."""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Self

from PIL.Image import Image

from editing.errors import InvalidEdit, InvalidPrompt, escape_pointer

PLACEHOLDER = "{}"
DEFAULT_TEMPLATES = ("An image of {}", "A photo of {}", "{}")
STYLE_TEMPLATES = ("painting by {}", "artwork by {}", "style of {}")

Objective = Literal["text", "noise", "hybrid"]
TextOptimizer = Literal["lbfgs", "adam"]
Preset = Literal["published"]


@dataclass(frozen=True)
class DestinationPrompt:
    """Draw the source as this prompt."""

    prompt: str

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InvalidPrompt(
                "the destination is empty: name a concept, or use an erasure", pointer="/destination/prompt"
            )
        check_text(self.prompt, pointer="/destination/prompt")


@dataclass(frozen=True)
class ReferenceImages:
    """Draw the source as in these pictures (Eq. 4), for a destination that a prompt cannot name."""

    images: tuple[Image, ...]

    def __post_init__(self) -> None:
        if not self.images:
            raise InvalidEdit("there is no reference image: give at least one", pointer="/destination/images")
        for index, image in enumerate(self.images):
            if not isinstance(image, Image):
                raise InvalidEdit("not an image", pointer=f"/destination/images/{index}")


@dataclass(frozen=True)
class Erasure:
    """Erase the source: each template is filled with `neutral` instead.

    By default it is filled with nothing: "a photo of {}" becomes "a photo of", and "{}" the empty prompt, which the
    diffusion model knows from classifier-free guidance. For a style, a word such as "art" is a better neutral.
    """

    neutral: str = ""

    def __post_init__(self) -> None:
        check_text(self.neutral, pointer="/destination/neutral")


@dataclass(frozen=True)
class Balance:
    """Draw the source as a mixture: its value is the weighted mean of the values of these prompts.

    Weights are relative; `shares` are normalized to sum to one.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        if len(self.weights) < 2:
            raise InvalidEdit("a balance needs at least two prompts", pointer="/destination/balance")
        for prompt, weight in self.weights.items():
            pointer = f"/destination/balance/{escape_pointer(prompt)}"
            if not prompt.strip():
                raise InvalidPrompt("an empty prompt cannot be balanced", pointer=pointer)
            check_text(prompt, pointer=pointer)
            if not _is_number(weight) or weight < 0:
                raise InvalidEdit(f"a weight must be a finite number of at least 0, not {weight!r}", pointer=pointer)
        if not sum(self.weights.values()) > 0:
            raise InvalidEdit("the weights sum to 0", pointer="/destination/balance")

    @property
    def shares(self) -> dict[str, float]:
        total = sum(self.weights.values())
        return {prompt: weight / total for prompt, weight in self.weights.items()}


Destination = DestinationPrompt | ReferenceImages | Erasure | Balance


@dataclass(frozen=True, kw_only=True)
class StageOneSettings:
    """How stage I optimizes the value of one edit. Defaults are the paper's where it gives any."""

    objective: Objective = "hybrid"
    """`text`: Eq. 2. `noise`: Eq. 3, or Eq. 4 for reference images. `hybrid`: Eq. 6, the sum of both."""
    optimization_steps: int = 200
    learning_rate: float = 0.2
    """Learning rate of Adam."""
    text_optimizer: TextOptimizer = "lbfgs"
    """Optimizer of the steps that use the text loss alone. The other steps use Adam."""
    tolerance: float = 1e-3
    """The text steps end early once three of them lower the loss by less than this share of the first loss. With 0,
    L-BFGS ends at a minimum and Adam uses all of its steps."""
    text_weight: float = 0.01
    """λ_s of Eq. 6: weight of the text loss in a hybrid edit. With 0, the text loss is used by the warm-up alone."""
    weight_decay: float = 0.0
    """Weight of ‖δ‖²/‖h‖² in the loss. The published 5e-4 makes δ a third shorter, since the text loss weighs only
    0.01; other names of the source then hardly follow the edit (docs/decisions/0013)."""
    max_delta_norm: float = 1.5
    """Upper bound of ‖δ‖/‖h‖."""
    seed: int = 0
    layer: int | None = None
    """L, the layer to whose output δ is added. None: the last but one."""
    warmup_steps: int = 160
    """Number of first steps of a hybrid edit that use the text loss alone, which needs no U-Net. At most four fifths of
    `optimization_steps`, so that a short optimization uses the noise loss too. 0: both losses in every step, as
    published."""
    num_images: int = 6
    """Number of pictures of the destination drawn for Eq. 3, spread over the templates."""
    num_inference_steps: int | None = None
    """Of those pictures. None: the default of the pipeline's family."""
    guidance_scale: float | None = None
    """Of those pictures. None: the default of the pipeline's family."""
    noise_pool_size: int = 64
    """Number of noised latents drawn once per edit."""
    noise_batch_size: int = 3
    """Number of latents of the pool that each step uses."""

    def __post_init__(self) -> None:
        if self.objective not in ("text", "noise", "hybrid"):
            raise _bad_setting("objective", f'must be "text", "noise" or "hybrid", not {self.objective!r}')
        if self.text_optimizer not in ("lbfgs", "adam"):
            raise _bad_setting("text_optimizer", f'must be "lbfgs" or "adam", not {self.text_optimizer!r}')
        for name in ("learning_rate", "tolerance", "text_weight", "weight_decay", "max_delta_norm", "guidance_scale"):
            number, positive = getattr(self, name), name in ("learning_rate", "max_delta_norm")
            if number is None and name == "guidance_scale":
                continue
            if not _is_number(number) or number < 0 or (positive and number == 0):
                raise _bad_setting(
                    name, f"must be a finite number {'above' if positive else 'of at least'} 0, not {number!r}"
                )
        for name, least in _LEAST.items():
            integer = getattr(self, name)
            if integer is None and name in ("layer", "num_inference_steps"):
                continue
            if not isinstance(integer, int) or isinstance(integer, bool) or integer < least:
                raise _bad_setting(name, f"must be a whole number of at least {least}, not {integer!r}")
        if self.seed >= 2**63:
            raise _bad_setting("seed", "must be below 2^63")
        if self.objective == "hybrid" and self.text_weight == 0 and self.warmup_steps == 0:
            detail = 'must be above 0 in a hybrid edit without warm-up: without a text loss, use "noise"'
            raise _bad_setting("text_weight", detail)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the settings of this name with some overridden. `published`: as the paper's code ran."""
        if name not in PRESETS:
            raise _bad_setting("preset", f"must be one of {', '.join(PRESETS)}, not {name!r}")
        return cls(**{**PRESETS[name], **overrides})


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "published": MappingProxyType(
            {
                "objective": "hybrid",
                "optimization_steps": 200,
                "learning_rate": 0.2,
                "text_optimizer": "adam",
                "tolerance": 0.0,
                "text_weight": 0.01,
                "weight_decay": 5e-4,
                "max_delta_norm": 1.5,
                "warmup_steps": 0,
            }
        )
    }
)
"""Settings of stage I by name; the others have their defaults."""

UPDATE_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"published": MappingProxyType({"residual_schedule": "published", "moment_weight": 4000.0, "alpha": 0.5})}
)
"""Arguments of stage II (`compute_update`) by name; the others have their defaults."""


_LEAST = {
    "optimization_steps": 1, "seed": 0, "layer": 0, "warmup_steps": 0, "num_images": 1, "num_inference_steps": 1,
    "noise_pool_size": 1, "noise_batch_size": 1,
}  # fmt: skip


@dataclass(frozen=True)
class ConceptEdit:
    """One edit: where a prompt names `source`, draw `destination`.

    Source and destination fill the same templates, pair by pair. Each template has `{}` exactly once.
    """

    source: str
    destination: Destination
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    settings: StageOneSettings = field(default_factory=StageOneSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        if not self.source.strip():
            raise InvalidPrompt("the source is empty: name the concept to edit", pointer="/source")
        check_text(self.source, pointer="/source")
        if not self.templates:
            raise InvalidPrompt('there is no template: give at least one, such as "{}"', pointer="/templates")
        for index, template in enumerate(self.templates):
            split_template(template, pointer=f"/templates/{index}")
        if isinstance(self.destination, ReferenceImages) and self.settings.objective == "text":
            raise _bad_setting("objective", 'must be "noise" or "hybrid" for reference images, which have no text')

    @property
    def objective(self) -> Objective:
        """The objective of stage I. Reference images have a noise loss only."""
        return "noise" if isinstance(self.destination, ReferenceImages) else self.settings.objective


def parse_edit(
    *,
    source: str,
    destination: Mapping[str, Any],
    templates: Sequence[str],
    settings: Mapping[str, Any],
    read_image: Callable[[str], Image],
) -> ConceptEdit:
    """Build an edit from the JSON of the API. `read_image` returns the image of an id.

    Raises `InvalidEdit` for what this version does not know.
    """
    parsed: Destination
    match destination:
        case {"prompt": str(prompt)}:
            parsed = DestinationPrompt(prompt)
        case {"images": [*ids]}:
            parsed = ReferenceImages(tuple(map(read_image, ids)))
        case {"erase": True}:
            parsed = Erasure(destination.get("neutral", ""))
        case {"balance": dict(weights)}:
            parsed = Balance(weights)
        case _:
            raise InvalidEdit("an unknown kind of destination", pointer="/destination")
    try:
        stage_one = StageOneSettings(**settings)
    except TypeError as error:
        raise InvalidEdit(f"an unknown setting: {error}", pointer="/settings") from error
    return ConceptEdit(source, parsed, tuple(templates), stage_one)


def split_template(template: str, *, pointer: str = "") -> tuple[str, str]:
    """Return the text before and after the placeholder. Raises `InvalidPrompt` unless there is exactly one."""
    check_text(template, pointer=pointer)
    parts = template.split(PLACEHOLDER)
    if len(parts) != 2:
        found = "no placeholder" if len(parts) == 1 else f"{len(parts) - 1} placeholders"
        raise InvalidPrompt(
            f"the template {template!r} has {found}: write {{}} once, in place of the concept", pointer=pointer
        )
    return parts[0], parts[1]


def fill_template(template: str, subject: str) -> str:
    """Replace the placeholder by the subject. Braces in the subject have no meaning."""
    before, after = split_template(template)
    return f"{before}{subject}{after}"


def check_text(text: Any, *, pointer: str) -> None:
    """Raise `InvalidPrompt` for what a tokenizer or Postgres refuses: no string, NUL, a lone surrogate."""
    if not isinstance(text, str):
        raise InvalidPrompt(f"must be text, not {type(text).__name__}", pointer=pointer)
    if "\0" in text:
        raise InvalidPrompt("the text has a NUL character: remove it", pointer=pointer)
    if has_lone_surrogate(text):
        raise InvalidPrompt("the text has half of a surrogate pair, which is no character: remove it", pointer=pointer)


_INVISIBLE = re.compile(
    # Unicode's Default_Ignorable_Code_Point, control characters, blank letters, and line separators.
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b"
    r"\u200e\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
    # Joiners and variation selectors have a meaning in emoji and in scripts after Cyrillic only.
    r"|(?<![\u0590-\U0010ffff#*0-9©®])[\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]"
    r"|[\u200c\u200d](?![\u0590-\U0010ffff])"
)


def refuse_invisible(text: str, *, pointer: str) -> None:
    """Raise `InvalidPrompt` for a character that shows nothing, such as a zero-width space.

    It would make another text of one that looks the same.
    """
    if found := _INVISIBLE.search(text):
        character = found[0]
        name = f"U+{ord(character):04X} {unicodedata.name(character, 'control character')}"
        detail = f"the text has an invisible character, {name}, in place {found.start() + 1}: remove it"
        raise InvalidPrompt(detail, pointer=pointer)


def has_lone_surrogate(text: str) -> bool:
    """Return whether the text has half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_number(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def _bad_setting(name: str, detail: str) -> InvalidEdit:
    return InvalidEdit(f"{name} {detail}", pointer=f"/settings/{name}")
