"""Schemas of edits."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emender.schemas.common import ProblemNote, Progress
from emender.schemas.presets import STAGE_ONE_PRESETS, Preset, apply_preset
from emender.schemas.text import NormalText, Text

EditState = Literal["queued", "optimizing", "ready", "failed", "cancelling", "cancelled"]
MAX_BATCH = 5000
Objective = Literal["text", "noise", "hybrid"]
TextOptimizer = Literal["lbfgs", "adam"]

MAX_IMAGES = 64
DEFAULT_TEMPLATES = ("An image of {}", "A photo of {}", "{}")

Prompt = Annotated[Text, Field(min_length=1, max_length=500)]
Source = Annotated[NormalText, Field(min_length=1, max_length=500)]
ImageId = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
LabelName = Annotated[Text, Field(min_length=1, max_length=64)]
LabelValue = Annotated[Text, Field(max_length=256)]


class Destination(BaseModel):
    """What to draw for the source: exactly one of `prompt`, `images`, `erase` and `balance`."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt | None = Field(default=None, description="prompt to draw instead of the source")
    images: Annotated[list[ImageId], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        default=None, description="uploaded reference images to draw like"
    )
    erase: Literal[True] | None = Field(default=None, description="erase the source")
    neutral: Annotated[Text, Field(max_length=500)] | None = Field(
        default=None, description="with `erase`: text in its place, such as `art` for a style"
    )
    balance: Annotated[dict[Prompt, Weight], Field(min_length=2, max_length=64)] | None = Field(
        default=None,
        description="mixture of these prompts. If the model's classifier distinguishes them, the weights are shares of "
        "pictures, else weights of their values; `values` says which",
    )

    @model_validator(mode="after")
    def require_exactly_one(self) -> "Destination":
        present = [name for name in ("prompt", "images", "erase", "balance") if getattr(self, name) is not None]
        if len(present) != 1:
            found = " and ".join(present) or "none"
            raise ValueError(f"must be exactly one of prompt, images, erase and balance; {found} given")
        if self.neutral is not None and self.erase is None:
            raise ValueError("neutral requires erase")
        return self


class StageOneSettings(BaseModel):
    """Settings of the optimization of stage I. Missing fields have the preset's value, else the default."""

    model_config = ConfigDict(extra="forbid")

    preset: Preset | None = Field(
        default=None,
        exclude=True,
        description="named settings; other fields take precedence. `published`, as in the paper's code: "
        f"{json.dumps(dict(STAGE_ONE_PRESETS['published']))}. The edit stores the resulting settings, not the name",
    )
    objective: Objective = Field(default="hybrid", description="loss to minimize; reference images always use `noise`")
    optimization_steps: Annotated[int, Field(ge=1, le=2000)] = 200
    learning_rate: Annotated[float, Field(gt=0, le=10, description="of Adam")] = 0.2
    text_optimizer: TextOptimizer = Field(
        default="lbfgs",
        description="optimizer of the steps with the text loss alone; Adam does the steps with the noise loss",
    )
    tolerance: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1e-3,
        description="steps with the text loss alone end early when three of them together lower the loss by less than "
        "this share of the first loss",
    )
    text_weight: Annotated[float, Field(ge=0, le=100)] = 0.01
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    max_delta_norm: Annotated[float, Field(gt=0, le=100)] = 1.5
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    layer: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="layer whose output is edited; default: the last but one"
    )
    warmup_steps: Annotated[
        int,
        Field(
            ge=0,
            le=2000,
            description="first steps of a hybrid edit with the text loss alone, at most 4/5 of `optimization_steps`",
        ),
    ] = 160
    num_images: Annotated[int, Field(ge=1, le=64)] = 6
    num_inference_steps: Annotated[int, Field(ge=1, le=200)] | None = Field(
        default=None, description="of pictures of the destination; default: that of the model's family"
    )
    guidance_scale: Annotated[float, Field(ge=0, le=50)] | None = Field(
        default=None, description="of pictures of the destination; default: that of the model's family"
    )
    noise_pool_size: Annotated[int, Field(ge=1, le=1024)] = 64
    noise_batch_size: Annotated[int, Field(ge=1, le=64)] = 3

    @model_validator(mode="before")
    @classmethod
    def resolve_preset(cls, body: object) -> object:
        return apply_preset(body, STAGE_ONE_PRESETS)


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

    source: Annotated[Source, Field(description="concept to edit, as prompts name it")]
    destination: Destination
    templates: Annotated[
        list[Prompt], Field(min_length=1, max_length=32, description="prompts with {} once, where the concept goes")
    ] = list(DEFAULT_TEMPLATES)
    settings: StageOneSettings = StageOneSettings()
    reason: Annotated[Text, Field(max_length=2000)] | None = None
    labels: Annotated[dict[LabelName, LabelValue], Field(max_length=32)] = {}


class BalanceRound(BaseModel):
    """One round of the search for the weights of a balance."""

    factors: dict[str, float] = Field(description="weight of each prompt's value")
    shares: dict[str, float] = Field(description="share of the pictures that show each prompt")
    difference: float = Field(description="largest difference between a share and the requested share")


class BalanceOut(BaseModel):
    """How the values of the prompts of a balance were mixed."""

    factors: dict[str, float] = Field(description="weight of each prompt's value")
    shares: dict[str, float] | None = Field(
        description="shares in the pictures of the last round; null: no picture was classified"
    )
    converged: bool | None = Field(description="whether they are within 0.02 of the requested shares")
    rounds: list[BalanceRound]
    statistics: str | None = Field(description="sha256 of the statistics that the pictures were drawn with")
    note: str | None = Field(description="why no picture was classified")


class EncoderValueOut(BaseModel):
    """The value in one text encoder."""

    name: str = Field(examples=["text_encoder"])
    layer: int = Field(description="layer whose output δ is added to")
    delta_norm: float | None = Field(description="‖δ‖")
    hidden_norm: float | None = Field(description="‖h‖")


class ValueOut(BaseModel):
    """The result of stage I. `GET /v1/edits/{id}/value` has the vectors."""

    sha256: str = Field(description="sha256 of the file with the vectors")
    encoders: list[EncoderValueOut]
    text_loss: float | None = Field(description="text loss of the last step")
    noise_loss: float | None = Field(description="noise loss of the last step")
    attempt: int
    engine: str
    balance: BalanceOut | None = Field(description="null for other destinations")


class EditOut(BaseModel):
    """An edit."""

    id: UUID
    model: str = Field(description="name of the model")
    source: str
    destination: dict[str, Any] = Field(description="exactly one of prompt, images, erase and balance")
    templates: list[str]
    settings: dict[str, Any] = Field(description="all settings, including defaults")
    reason: str | None
    labels: dict[str, str]
    state: EditState
    progress: Progress | None = Field(description="while a worker optimizes it")
    attempt: int = Field(description="number of attempts since it was last queued")
    problem: ProblemNote | None = Field(description="why it failed")
    value: ValueOut | None = Field(description="once ready")
    created_by: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Losses:
    """The losses of each step."""

    text: list[float]
    noise: list[float]


class EditRef(BaseModel):
    """An edit of a batch."""

    id: UUID
    source: str


class EditBatchOut(BaseModel):
    """The edits of a batch, in order."""

    count: int
    edits: list[EditRef]
