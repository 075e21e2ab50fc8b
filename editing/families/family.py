"""What a pipeline family is: its text encoders, and how inference makes token ids of a prompt. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

EncoderKind = Literal["clip", "t5", "decoder"]
Tap = int | Literal["final"]
"""Where a text encoder is read: after this number of blocks (negative: from the end), or after the final norm.

Before the final norm, -1 is after the last block and -2 after the last but one, as indices of `hidden_states` count.
"""


@dataclass(frozen=True)
class PromptFormat:
    """How inference makes token ids of a prompt."""

    max_length: int | None = None
    """Tokens that inference reads, special tokens included. None: as the tokenizer's configuration says."""
    prefix: str = ""
    """Text before the prompt."""
    suffix: str = ""
    """Text after the prompt."""
    chat: Mapping[str, bool] | None = None
    """Arguments of the tokenizer's chat template, which then gives prefix and suffix. None: no chat template."""
    lowercase: bool = False
    """Whether the prompt is converted to lowercase and stripped of spaces around it."""
    pads_right: bool = False
    """Whether the padding is at the right also if the tokenizer's configuration says left."""
    extend_by_prefix: bool = False
    """Whether the prefix's tokens do not count for `max_length`, as in Sana."""


@dataclass(frozen=True)
class EncoderSpec:
    """A text encoder of a family."""

    name: str
    """Of the component, such as "text_encoder_2"."""
    tokenizer: str
    """Name of its tokenizer's component."""
    kind: EncoderKind
    format: PromptFormat = PromptFormat()
    """Of prompts."""
    negative: PromptFormat | None = None
    """Of negative prompts in classifier-free guidance, if another."""
    is_masked: bool = False
    """Whether attention leaves the padding out."""
    pads_to_longest: bool = False
    """Whether prompts are padded to the longest of a batch rather than to the full length."""
    taps: tuple[Tap, ...] = ("final",)
    """What the generator reads; none if it takes only the pooled output."""
    edited_layers: int | None = None
    """Number of layers edited by default. None: every layer up to the one that values are optimized for, of CLIP, and
    three of any other encoder."""


@dataclass(frozen=True)
class Family:
    """A family of pipelines."""

    name: str
    pipeline_class: str
    """In `model_index.json`."""
    encoders: tuple[EncoderSpec, ...]
    """In the order in which the pipeline has them."""
    generator: Literal["unet", "transformer"] = "transformer"
    dropped_tokens: int = 0
    """Number of first tokens that the generator does not receive."""
    num_inference_steps: int = 20
    """Of sampling, by default: as the pipeline has it, but fewer for U-Nets, which get a faster solver."""
    guidance_scale: float = 7.5
    """Of sampling, by default."""

    @property
    def components(self) -> tuple[str, ...]:
        """The components that editing needs."""
        encoders = (name for spec in self.encoders for name in (spec.name, spec.tokenizer))
        return (*encoders, self.generator, "vae", "scheduler")

    @property
    def projection_method(self) -> Literal["cross_attention", "text_projection"]:
        """The method that edits the matrices through which the generator reads the text."""
        return "cross_attention" if self.generator == "unet" else "text_projection"

    @property
    def edited_components(self) -> tuple[str, ...]:
        """The components that edits are written into."""
        return (*(spec.name for spec in self.encoders), self.generator)

    def complete_sampling(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the settings of sampling that are None by the defaults."""
        defaults = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: defaults.get(name) if value is None else value for name, value in settings.items()}

    def find_encoder(self, name: str) -> EncoderSpec:
        """Return the encoder of this name."""
        return next(spec for spec in self.encoders if spec.name == name)


def chat(**options: bool) -> PromptFormat:
    """Return the format of a user's message in the tokenizer's chat template, followed by the assistant's turn."""
    return PromptFormat(max_length=512, chat=MappingProxyType({"add_generation_prompt": True, **options}))


def clip(name: str = "text_encoder", **settings: object) -> EncoderSpec:
    """Return a CLIP text encoder."""
    return EncoderSpec(name, _tokenizer(name), "clip", **settings)  # type: ignore[arg-type]


def t5(name: str = "text_encoder", *, max_length: int, lowercase: bool = False, is_masked: bool = True) -> EncoderSpec:
    """Return a T5 text encoder that is read after its final norm."""
    return EncoderSpec(
        name, _tokenizer(name), "t5", PromptFormat(max_length=max_length, lowercase=lowercase), is_masked=is_masked
    )


def decoder(format: PromptFormat, *, taps: tuple[Tap, ...], **settings: object) -> EncoderSpec:
    """Return a decoder-only language model, whose attention leaves out the padding."""
    name = "text_encoder"
    return EncoderSpec(name, _tokenizer(name), "decoder", format, taps=taps, is_masked=True, **settings)  # type: ignore[arg-type]


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")
