"""Schemas of previews and evaluations."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from emender.schemas.common import FileOut, Progress
from emender.schemas.text import Text, check_template

MAX_PICTURES = 400
EvaluationKind = Literal["preview", "check", "evaluation"]
EvaluationState = Literal["queued", "running", "ready", "failed", "cancelled"]

Prompt = Annotated[Text, Field(min_length=1, max_length=1_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


FREE_PROMPTS = (
    "a picture of the {}",
    "look at this {}",
    "a drawing of a {}",
    "a {} on a white background",
    "a small {}",
)


Template = Annotated[Prompt, AfterValidator(check_template)]


class Drawing(BaseModel):
    """Settings of sampling."""

    num_inference_steps: int | None = Field(
        default=None, ge=1, le=100, description="number of inference steps; default: that of the model's family"
    )
    guidance_scale: float | None = Field(
        default=None, ge=0, le=50, allow_inf_nan=False, description="default: that of the model's family"
    )


class PreviewCreate(Drawing):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"prompts": ["a photo of the US president"], "controls": ["a photo of a cat"], "seeds": [1, 2]}
            ]
        },
    )

    prompts: list[Prompt] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="prompts to draw; default: the first template of each of the first 20 edits, with its source",
    )
    controls: list[Prompt] = Field(default=[], max_length=100, description="prompts that must not change")
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1, max_length=8)

    @model_validator(mode="after")
    def limit_pictures(self) -> "PreviewCreate":
        pictures = 2 * len(self.seeds) * (len(self.prompts or []) + len(self.controls))
        if pictures > MAX_PICTURES:
            raise ValueError(f"would draw {pictures} pictures, before and after; the maximum is {MAX_PICTURES}")
        return self


class EvaluationCreate(Drawing):
    """What to measure. Prompts have `{}` where the concept goes."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"scales": [1, 10, 30], "guidance_scale": 7.5, "seed": 0}]}
    )

    prompts: list[Template] = Field(
        default=list(FREE_PROMPTS),
        min_length=1,
        max_length=20,
        description="prompts that edits are evaluated on besides their templates, preferably different ones",
    )
    held_out: list[Prompt] | None = Field(
        default=None,
        max_length=500,
        description="classes that no edit must change; default: 30 of those that the classifier knows, evenly spaced",
    )
    held_out_prompts: list[Template] = Field(default=list(FREE_PROMPTS[:2]), min_length=1, max_length=20)
    scales: list[Annotated[int, Field(ge=1)]] = Field(
        default=[],
        max_length=10,
        description="numbers of edits, from the first, to measure separately, to see how quality scales",
    )
    seed: Seed = Field(default=0, description="seed of the first picture of each concept; the others follow")


class EvaluationOut(BaseModel):
    """A preview, a check or an evaluation of a published checkpoint."""

    id: UUID
    kind: EvaluationKind
    model: str
    version: str
    state: EvaluationState
    request: dict[str, Any]
    progress: Progress | None
    report: dict[str, Any] | None = Field(description="results, once it is ready")
    files: list[FileOut] = Field(description="served at …/files/{path}")
    problem: dict[str, Any] | None
    created_by: str
    created_at: datetime
