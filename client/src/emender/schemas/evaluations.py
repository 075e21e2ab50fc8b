"""What the calls for previews and evaluations take and give."""

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
    """How pictures are drawn."""

    num_inference_steps: int = Field(20, ge=1, le=100, description="of the solver")
    guidance_scale: float = Field(7.5, ge=0, le=50, allow_inf_nan=False)


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
        None,
        min_length=1,
        max_length=100,
        description="default: the first template of each edit, with its source, of the first 20 edits",
    )
    controls: list[Prompt] = Field([], max_length=100, description="prompts that should be drawn as before")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, max_length=8)

    @model_validator(mode="after")
    def be_bounded(self) -> "PreviewCreate":
        pictures = 2 * len(self.seeds) * (len(self.prompts or []) + len(self.controls))
        if pictures > MAX_PICTURES:
            raise ValueError(f"would draw {pictures} pictures, before and after; ask for at most {MAX_PICTURES}")
        return self


class EvaluationCreate(Drawing):
    """What is measured. Templates hold `{}` where a concept goes."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"scales": [1, 10, 30], "guidance_scale": 7.5, "seed": 0}]}
    )

    prompts: list[Template] = Field(
        list(FREE_PROMPTS),
        min_length=1,
        max_length=20,
        description="by which edits are judged beside their own templates: better none of those",
    )
    held_out: list[Prompt] | None = Field(
        None,
        max_length=500,
        description="classes that no edit should change; default: 30 of those that the classifier knows, evenly",
    )
    held_out_prompts: list[Template] = Field(list(FREE_PROMPTS[:2]), min_length=1, max_length=20)
    scales: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        max_length=10,
        description="also measure the first so many of the edits that can be judged alone, to see how quality scales",
    )
    seed: Seed = Field(0, description="of the first picture of each concept; the others count up from it")


class EvaluationOut(BaseModel):
    """Something that was drawn or measured of a published version."""

    id: UUID
    kind: EvaluationKind
    model: str
    version: str
    state: EvaluationState
    request: dict[str, Any]
    progress: Progress | None
    report: dict[str, Any] | None = Field(description="what was found, once it is ready")
    files: list[FileOut] = Field(description="to be had below /files/{path}")
    problem: dict[str, Any] | None
    created_by: str
    created_at: datetime
