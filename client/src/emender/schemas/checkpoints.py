"""Schemas of checkpoints and aliases."""

import json
import re
from datetime import date, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from emender.schemas.common import FileOut, Progress
from emender.schemas.presets import STAGE_TWO_PRESETS, Preset, apply_preset
from emender.schemas.text import Text
from emender.schemas.timestamps import BareDate, Rfc3339DateTime

MAX_EDITS = 20_000
MAX_EDITS_IN_CONTEXTS = 500
"""Maximum of edits with `many` contexts: each adds about forty columns to the system, which must fit in memory."""
VERSION = r"^v[1-9][0-9]{0,8}$"
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
RESERVED_ALIASES = frozenset({"main", "base"})

CheckpointState = Literal["building", "published", "failed", "retracted"]
ResidualSchedule = Literal["spread", "even", "published"]
Contexts = Literal["own", "many"]
Method = Literal["text_encoder", "cross_attention", "text_projection"]

UCE_METHODS: tuple[Method, ...] = ("cross_attention", "text_projection")
"""The methods that edit the matrices through which the generator reads the text. Each model takes one of them."""
METHOD_SETTINGS: dict[Method, tuple[str, ...]] = {
    "text_encoder": ("preset", "alpha", "layers", "residual_schedule", "moment_weight", "contexts"),
    **dict.fromkeys(UCE_METHODS, ("erase_scale", "preserve_scale", "regularization_weight")),
}
"""The fields of an apply that not every method uses."""


def _check_alias(name: str) -> str:
    taken = name in RESERVED_ALIASES or re.fullmatch(VERSION, name) or re.fullmatch(r"[0-9a-f]{40}", name)
    if taken or ".." in name or "--" in name or name.endswith((".", ".git", ".lock")):
        raise ValueError(
            f"{name!r} cannot be an alias: versions (v3), commits, 'main' and 'base' have other meanings, "
            "and the Hub's clients reject '--', '..' and '.git'"
        )
    return name


def _check_selection(value: object) -> object:
    """Check the type only. The service checks each id, and names those that are invalid."""
    if value == "ready" or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError('must be "ready" or a list of at least one edit id')


AliasName = Annotated[str, Field(pattern=REVISION), AfterValidator(_check_alias)]
Selection = Annotated[
    Any,
    BeforeValidator(_check_selection),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "ready", "type": "string"},
                {"type": "array", "items": {"type": "string", "format": "uuid"}, "minItems": 1},
            ]
        }
    ),
]


class ApplyCreate(BaseModel):
    """Which edits to apply, and how. Exactly one of `edits` and `from`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"edits": "ready", "alpha": 0.5, "alias": "staging", "notes": "weekly corrections"},
                {"from": "v3", "remove": ["019376f0-6f3c-7a10-8e25-3d2f6a1b9c04"]},
                {"from": "v3", "add": ["019376f0-6f3c-7a10-8e25-3d2f6a1b9c04"], "method": "cross_attention"},
            ]
        },
    )

    edits: Selection = Field(default=None, description='edit ids, or "ready": the newest ready edit of each source')
    base: str | None = Field(default=None, alias="from", pattern=REVISION, description="version or alias to start from")
    add: list[str] = Field(
        default=[],
        max_length=MAX_EDITS,
        description="with `from`: edit ids to add; they replace edits of the same source",
    )
    remove: list[str] = Field(default=[], max_length=MAX_EDITS, description="with `from`: edit ids to remove")
    method: Method = Field(
        default="text_encoder",
        description="where `edits` or `add` are written. `text_encoder`: the text encoder's MLPs (EMCID). "
        "`cross_attention`: the keys and values of the U-Net's cross-attention (UCE), for concepts that a text encoder "
        "cannot forget; it changes other concepts much unless many are in `preserve`. `text_projection`: the same for "
        "a model with a transformer, in the matrix through which it reads the text. With `from`, existing edits stay "
        "where they were written, with the settings of that checkpoint",
    )
    preset: Preset | None = Field(
        default=None,
        description="named settings; other fields take precedence. `published`, as in the paper's code: "
        f"{json.dumps(dict(STAGE_TWO_PRESETS['published']))}",
    )
    alpha: float = Field(default=0.5, gt=0, lt=1, description="weight of the edits against existing knowledge (Eq. 14)")
    layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="layers to edit; the last is the one the values were optimized for. Default: all up to it, and "
        "for SDXL the published ones, which cannot be changed",
    )
    residual_schedule: ResidualSchedule = Field(default="spread", description="how the layers share the residual")
    moment_weight: float = Field(
        default=1000.0, gt=0, allow_inf_nan=False, description="weight λ of the second moments"
    )
    contexts: Contexts = Field(
        default="own",
        description="`text_encoder`: prompts in which an edit must hold. `own`: the mean of its templates. `many`: its "
        "templates and 32 more prompts, each separately; the tokens after the subject stay as they are. Use `many` for "
        "unknown names of several tokens, which `own` often misses in other prompts, and put known names that end in "
        f"the same token in `preserve`. At most {MAX_EDITS_IN_CONTEXTS} edits",
    )
    preserve: list[Text] = Field(
        default=[],
        max_length=5_000,
        description="prompts that must keep their meaning. `text_encoder` keeps the value of their last token, "
        "the other methods the whole input of the U-Net or transformer",
    )
    erase_scale: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="UCE: weight of each state of an edit"
    )
    preserve_scale: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="UCE: weight of each state of a preserved prompt",
    )
    regularization_weight: float = Field(
        default=0.5, gt=0, allow_inf_nan=False, description="UCE: λ; raise it if other concepts change"
    )
    notes: Text | None = Field(default=None, max_length=4_000)
    dry_run: bool = Field(default=False, description="return what would be applied, and create nothing")
    alias: AliasName | None = Field(
        default=None,
        description="alias to move to the checkpoint when it is published, unless someone else moved it first",
    )

    @model_validator(mode="before")
    @classmethod
    def resolve_preset(cls, body: object) -> object:
        return apply_preset(body, STAGE_TWO_PRESETS)


class EditInCheckpoint(BaseModel):
    """An edit of a checkpoint."""

    id: UUID
    source: str
    destination: dict[str, Any]
    relative_residual: float | None = Field(default=None, description="‖z - h‖ / ‖δ‖. 0: fully applied. 1: no effect")
    method: Method = Field(default="text_encoder", description="where the edit is written")


class ConflictOut(BaseModel):
    """Two edits that contradict each other."""

    kind: Literal["same source", "source is a destination", "same key"]
    edits: tuple[UUID, UUID]
    cosine: float | None = None


class EditWarning(BaseModel):
    """An edit that did not succeed."""

    edit: UUID
    detail: str = Field(description="what is wrong, and what to do")


class LayerOut(BaseModel):
    """A changed layer of a text encoder."""

    encoder: str
    layer: int
    relative_norm: float = Field(description="‖ΔW‖ / ‖W‖")
    condition: float = Field(description="condition number of the solved system")


class ProjectionOut(BaseModel):
    """A changed projection: of the U-Net's cross-attention, or the transformer's text projection."""

    tensor: str = Field(examples=["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"])
    relative_norm: float = Field(description="‖ΔW‖ / ‖W‖")


class UceOut(BaseModel):
    """Settings of the edits in the U-Net's cross-attention or the transformer's text projection."""

    erase_scale: float
    preserve_scale: float
    regularization_weight: float
    preserve: list[str]


class EvaluationLink(BaseModel):
    """A link to an evaluation of a checkpoint."""

    id: UUID
    kind: Literal["preview", "check", "evaluation"]
    state: str
    url: str = Field(examples=["/v1/models/emoji/checkpoints/v3/evaluations/019376f0-6f3c-7a10-8e25-3d2f6a1b9c04"])


class AliasOutcome(BaseModel):
    """Whether the alias of an apply was moved."""

    name: str
    moved: bool
    detail: str


class CheckpointSummary(BaseModel):
    """A checkpoint in a list."""

    version: str = Field(examples=["v3"])
    model: str
    state: CheckpointState
    commit: str | None = Field(description="40 hex digits derived from all files of the checkpoint")
    edit_count: int
    alpha: float | None = Field(
        description="null if no edit is in the text encoder, like `residual_schedule`, `moment_weight` and `contexts`"
    )
    layers: list[int] = Field(description="edited layers of the first text encoder; `changed_layers` has those of all")
    aliases: list[str]
    notes: str | None
    parent: str | None = Field(description="version that `from` named")
    created_by: str
    created_at: datetime
    published_at: datetime | None
    retracted_at: datetime | None


class CheckpointOut(CheckpointSummary):
    """A checkpoint: a model's pipeline with edits applied."""

    edits: list[EditInCheckpoint]
    residual_schedule: ResidualSchedule | None
    moment_weight: float | None
    contexts: Contexts | None
    preserve: list[str]
    cross_attention: UceOut | None = Field(description="null if no edit is there")
    text_projection: UceOut | None = Field(description="null if no edit is there")
    statistics: str | None = Field(description="digest of the second moments; null if no edit is in the text encoder")
    files: list[FileOut]
    conflicts: list[ConflictOut]
    warnings: list[EditWarning]
    evaluations: list[EvaluationLink] = Field(description="newest first, at most 100")
    changed_layers: list[LayerOut]
    changed_projections: list[ProjectionOut] = Field(
        description="changed matrices through which the generator reads the text"
    )
    alias: AliasOutcome | None
    progress: Progress | None
    problem: dict[str, Any] | None = Field(description="why it failed or was retracted")


class ApplyPlan(BaseModel):
    """The result of a dry run."""

    model: str
    edits: list[EditInCheckpoint]
    superseded: list[UUID] = Field(description="edits left out because a newer edit has the same source")
    conflicts: list[ConflictOut]
    alpha: float | None
    layers: list[int] = Field(description="layers of the first text encoder")
    cross_attention: UceOut | None
    text_projection: UceOut | None
    statistics: str | None


class AliasOut(BaseModel):
    """An alias."""

    name: str
    version: str
    commit: str | None
    updated_at: datetime


class AliasPeriod(BaseModel):
    """A period in which an alias pointed at one version."""

    version: str | None = Field(description="null: the alias was deleted", examples=["v3"])
    commit: str | None
    since: datetime
    until: datetime | None = Field(description="null: until now")
    moved_by: str = Field(description="actor of the move; the audit log has the reason")


DateOrDateTime = Annotated[Annotated[date, BareDate] | Rfc3339DateTime, Field(union_mode="left_to_right")]


class AliasPut(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": "v3"}]})

    version: str = Field(pattern=VERSION)
    reason: Annotated[Text, Field(max_length=2_000)] | None = Field(
        default=None, description="reason, for the audit log"
    )


class Retraction(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"reason": "draws the wrong flag"}]})

    reason: Text = Field(min_length=1, max_length=4_000)


class LayerDifference(BaseModel):
    """A tensor that differs."""

    path: str
    tensor: str
    layer: int | None
    relative_norm: float = Field(description="‖W - W_against‖ / ‖W_against‖")


class FileDifference(BaseModel):
    """A file that differs."""

    path: str
    change: Literal["added", "removed", "changed"]
    sha256: str | None
    against_sha256: str | None


class DifferenceOut(BaseModel):
    """The difference of a checkpoint from another, or from the base model."""

    version: str
    against: str
    added: list[EditInCheckpoint]
    removed: list[EditInCheckpoint]
    layers: list[LayerDifference] = Field(description="all tensors of the text encoders and the generator that differ")
    files: list[FileDifference]


class FileOrigin(BaseModel):
    """A checkpoint or base model that has a file."""

    model: str
    version: str | None = Field(description="null: the base model")
    state: str
    path: str
    commit: str | None
    edits: list[EditInCheckpoint]
    evaluations: list[EvaluationLink] = Field(default=[], description="newest first, at most 100")


class FileProvenance(BaseModel):
    """Where a file comes from."""

    sha256: str
    size: int
    origins: list[FileOrigin]
