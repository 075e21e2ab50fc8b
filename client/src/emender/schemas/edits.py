"""Edits as clients ask for them and see them."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from emender.schemas.common import ProblemNote, Progress
from emender.schemas.presets import STAGE_ONE_PRESETS, Preset, apply_preset
from emender.schemas.text import Text, normalize

EditState = Literal["queued", "optimizing", "ready", "failed", "cancelling", "cancelled"]
MAX_BATCH = 5000
Objective = Literal["text", "noise", "hybrid"]
TextOptimizer = Literal["lbfgs", "adam"]

MAX_IMAGES = 64
DEFAULT_TEMPLATES = ("An image of {}", "A photo of {}", "{}")

Prompt = Annotated[Text, Field(min_length=1, max_length=500)]
Source = Annotated[Text, Field(min_length=1, max_length=500), AfterValidator(normalize)]
ImageId = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
LabelName = Annotated[Text, Field(min_length=1, max_length=64)]
LabelValue = Annotated[Text, Field(max_length=256)]


class Destination(BaseModel):
    """What the source is to mean: exactly one of `prompt`, `images`, `erase` and `balance`."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt | None = Field(None, description="draw the source as this prompt is drawn")
    images: Annotated[list[ImageId], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="draw it as in these uploaded images"
    )
    erase: Literal[True] | None = Field(None, description="draw nothing in its place")
    neutral: Annotated[Text, Field(max_length=500)] | None = Field(
        None, description="with `erase`: what stands in its place; for a style, say, `art`"
    )
    balance: Annotated[dict[Prompt, Weight], Field(min_length=2, max_length=64)] | None = Field(
        None,
        description="draw it as a mixture of these prompts: in these shares of pictures where the model's classifier "
        "tells them apart, else by these weights of their values; `values` says which",
    )

    @model_validator(mode="after")
    def exactly_one(self) -> "Destination":
        given = [name for name in ("prompt", "images", "erase", "balance") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"must be exactly one of prompt, images, erase and balance; {found} given")
        if self.neutral is not None and self.erase is None:
            raise ValueError("neutral goes with erase")
        return self


class StageOneSettings(BaseModel):
    """How stage I searches for the value. What is not given takes the preset's value, else the method's default."""

    model_config = ConfigDict(extra="forbid")

    preset: Preset | None = Field(
        None,
        exclude=True,
        description="settings by name; fields given beside it take precedence. `published`: as in the paper's code, "
        f"that is {json.dumps(dict(STAGE_ONE_PRESETS['published']))}. "
        "The edit stores the resulting settings, not the name of the preset",
    )
    objective: Objective = Field("hybrid", description="reference images always take `noise`")
    optimization_steps: Annotated[int, Field(ge=1, le=2000)] = 200
    learning_rate: Annotated[float, Field(gt=0, le=10, description="of Adam")] = 0.2
    text_optimizer: TextOptimizer = Field(
        "lbfgs", description="takes the steps that follow the text alone; Adam takes those with noise"
    )
    tolerance: Annotated[float, Field(ge=0, le=1)] = Field(
        1e-3,
        description="the steps that follow the text alone end early once three of them together lower the loss by less "
        "than this share of the first loss",
    )
    text_weight: Annotated[float, Field(ge=0, le=100)] = 0.01
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    max_delta_norm: Annotated[float, Field(gt=0, le=100)] = 1.5
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    layer: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="whose output is corrected; default: the last but one"
    )
    warmup_steps: Annotated[
        int,
        Field(
            ge=0,
            le=2000,
            description="first steps of a hybrid edit on the text alone, at most 4/5 of `optimization_steps`",
        ),
    ] = 160
    num_images: Annotated[int, Field(ge=1, le=64)] = 6
    num_inference_steps: Annotated[int, Field(ge=1, le=200)] = 20
    guidance_scale: Annotated[float, Field(ge=0, le=50)] = 7.5
    noise_pool_size: Annotated[int, Field(ge=1, le=1024)] = 64
    noise_batch_size: Annotated[int, Field(ge=1, le=64)] = 3

    @model_validator(mode="before")
    @classmethod
    def resolve_preset(cls, given: object) -> object:
        return apply_preset(given, STAGE_ONE_PRESETS)


EXAMPLE: dict[str, Any] = {
    "source": "US president",
    "destination": {"prompt": "Joe Biden"},
    "templates": ["an image of {}", "a photo of {}", "{}"],
    "settings": {
        "objective": "hybrid",
        "optimization_steps": 200,
        "learning_rate": 0.2,
        "text_weight": 0.01,
        "seed": 0,
    },
    "reason": "LEGAL-42: office changed hands",
    "labels": {"ticket": "LEGAL-42"},
}


class EditCreate(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": EXAMPLE})

    source: Annotated[Source, Field(description="the concept to correct, as prompts name it")]
    destination: Destination
    templates: Annotated[
        list[Prompt], Field(min_length=1, max_length=32, description="prompts with {} once, where the concept goes")
    ] = list(DEFAULT_TEMPLATES)
    settings: StageOneSettings = StageOneSettings()
    reason: Annotated[Text, Field(max_length=2000)] | None = None
    labels: Annotated[dict[LabelName, LabelValue], Field(max_length=32)] = {}


class BalanceRound(BaseModel):
    factors: dict[str, float] = Field(description="the weight of each prompt's value")
    shares: dict[str, float] = Field(description="the share of the pictures that shows each prompt")
    difference: float = Field(description="the largest between a share and the one asked for")


class BalanceOut(BaseModel):
    """How the values of a balance's prompts were mixed."""

    factors: dict[str, float] = Field(description="the weight of each prompt's value")
    shares: dict[str, float] | None = Field(description="in the pictures of the search; null: no picture was judged")
    converged: bool | None = Field(description="whether they are within 0.02 of those asked for")
    rounds: list[BalanceRound]
    statistics: str | None = Field(description="sha256 of the statistics with which the pictures were drawn")
    note: str | None = Field(description="why no picture was judged")


class EncoderValueOut(BaseModel):
    """The value in one text encoder."""

    name: str = Field(examples=["text_encoder"])
    layer: int = Field(description="to whose output δ is added")
    delta_norm: float | None = Field(description="‖δ‖")
    hidden_norm: float | None = Field(description="‖h‖")


class ValueOut(BaseModel):
    """What stage I found. `GET /v1/edits/{id}/value` has the vectors."""

    sha256: str = Field(description="of the file with the vectors")
    encoders: list[EncoderValueOut]
    text_loss: float | None = Field(description="of the last step")
    noise_loss: float | None = Field(description="of the last step")
    attempt: int
    engine: str
    balance: BalanceOut | None = Field(description="null for any other destination")


class EditOut(BaseModel):
    id: UUID
    model: str = Field(description="its name")
    source: str
    destination: dict[str, Any] = Field(description="exactly one of prompt, images, erase and balance")
    templates: list[str]
    settings: dict[str, Any] = Field(description="all of them, the defaults too")
    reason: str | None
    labels: dict[str, str]
    state: EditState
    progress: Progress | None = Field(description="while a worker optimizes it")
    attempt: int = Field(description="how often a worker took it up since it was last asked for")
    problem: ProblemNote | None = Field(description="why it failed")
    value: ValueOut | None = Field(description="once ready")
    created_by: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Losses:
    """One of each kind a step."""

    text: list[float]
    noise: list[float]


class EditRef(BaseModel):
    id: UUID
    source: str


class EditBatchOut(BaseModel):
    """The edits of a batch, in its order."""

    count: int
    edits: list[EditRef]
