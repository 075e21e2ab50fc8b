"""What the checkpoint calls take and give."""

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
"""Edits written in many contexts: each is some forty columns of the system, which memory must hold."""
VERSION = r"^v[1-9][0-9]{0,8}$"
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
RESERVED_ALIASES = frozenset({"main", "base"})

CheckpointState = Literal["building", "published", "failed", "retracted"]
ResidualSchedule = Literal["spread", "even", "published"]
Contexts = Literal["own", "many"]
Method = Literal["text_encoder", "cross_attention"]

METHOD_SETTINGS: dict[Method, tuple[str, ...]] = {
    "text_encoder": ("preset", "alpha", "layers", "residual_schedule", "moment_weight", "contexts"),
    "cross_attention": ("erase_scale", "preserve_scale", "regularization_weight"),
}
"""The fields of an apply that mean something to one method only."""


def _alias_name(name: str) -> str:
    taken = name in RESERVED_ALIASES or re.fullmatch(VERSION, name) or re.fullmatch(r"[0-9a-f]{40}", name)
    if taken or ".." in name or "--" in name or name.endswith((".", ".git", ".lock")):
        raise ValueError(
            f"{name!r} cannot name an alias: versions (v3), commits, 'main' and 'base' have a meaning of their own, "
            "and the Hub's clients refuse '--', '..' and '.git'"
        )
    return name


def _selection(value: object) -> object:
    """One clear message for what is neither; the ids themselves are checked where each can be named."""
    if value == "ready" or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError('must be "ready" or a list of at least one edit id')


AliasName = Annotated[str, Field(pattern=REVISION), AfterValidator(_alias_name)]
Selection = Annotated[
    Any,
    BeforeValidator(_selection),
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
    """Which edits, and how. Exactly one of `edits` and `from`."""

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

    edits: Selection = Field(None, description='edit ids, or "ready": of each source the newest edit that is ready')
    base: str | None = Field(None, alias="from", pattern=REVISION, description="a version or alias to start from")
    add: list[str] = Field([], max_length=MAX_EDITS, description="with `from`; replaces its edit of the same source")
    remove: list[str] = Field([], max_length=MAX_EDITS, description="with `from`; edit ids")
    method: Method = Field(
        "text_encoder",
        description="where `edits` or `add` are written. `text_encoder`: into the text encoder's MLPs, from their "
        "values (EMCID). `cross_attention`: into the keys and values of the U-Net's cross-attention, from their words "
        "alone (UCE), for concepts that a text encoder cannot forget; it costs other concepts much unless many "
        "are named in `preserve`. With `from`, edits that are there already stay where they were written, with "
        "the settings of that version",
    )
    preset: Preset | None = Field(
        None,
        description="fields by name; those given beside it come first. `published`: as the paper's code ran, "
        f"that is {json.dumps(dict(STAGE_TWO_PRESETS['published']))}",
    )
    alpha: float = Field(0.5, gt=0, lt=1, description="the edits' weight against what the encoder knows (Eq. 14)")
    layers: list[int] | None = Field(
        None,
        min_length=1,
        description="the layers to edit, ending at the one the values were optimised for; default: 0 … it, of SDXL the "
        "published ones, which cannot be chosen",
    )
    residual_schedule: ResidualSchedule = Field("spread", description="how the residual is shared among the layers")
    moment_weight: float = Field(1000.0, gt=0, allow_inf_nan=False, description="λ, the weight of the second moments")
    contexts: Contexts = Field(
        "own",
        description="`text_encoder`: where an edit is to hold. `own`: in its templates, by their mean; `many`: there "
        "and in 32 prompts more, each by itself, with what follows the subject left as it is. For names that the model "
        "does not know, in several pieces, which the first often misses in other prompts. Name what the model "
        "knows in `preserve` beside it: what ends in the same piece as a source is then kept in many prompts, "
        "too. "
        f"For at most {MAX_EDITS_IN_CONTEXTS} edits",
    )
    preserve: list[Text] = Field(
        [],
        max_length=5_000,
        description="prompts that are to keep their meaning: of `text_encoder` the value of their last token, of "
        "`cross_attention` all that the U-Net reads of them",
    )
    erase_scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="`cross_attention`: the weight of each of an edit's states"
    )
    preserve_scale: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="`cross_attention`: the weight of each of a preserved prompt's"
    )
    regularization_weight: float = Field(
        0.5, gt=0, allow_inf_nan=False, description="`cross_attention`: λ; raise it where other concepts suffer"
    )
    notes: Text | None = Field(None, max_length=4_000)
    dry_run: bool = Field(False, description="answer what would be applied, and create nothing")
    alias: AliasName | None = Field(
        None, description="moved to the new version once it is published, unless someone else moved it meanwhile"
    )

    @model_validator(mode="before")
    @classmethod
    def resolve_preset(cls, given: object) -> object:
        return apply_preset(given, STAGE_TWO_PRESETS)


class EditInCheckpoint(BaseModel):
    id: UUID
    source: str
    destination: dict[str, Any]
    relative_residual: float | None = Field(
        None, description="what the update left undone, ‖z - h‖ / ‖δ‖: 0 is an edit met exactly, 1 one not begun"
    )
    method: Method = Field("text_encoder", description="where the edit is written")


class ConflictOut(BaseModel):
    """Two edits that pull at one memory."""

    kind: Literal["same source", "source is a destination", "same key"]
    edits: tuple[UUID, UUID]
    cosine: float | None = None


class EditWarning(BaseModel):
    """An edit that did not take."""

    edit: UUID
    detail: str = Field(description="what is the matter, and what to do")


class LayerOut(BaseModel):
    encoder: str
    layer: int
    relative_norm: float = Field(description="‖ΔW‖ / ‖W‖")
    condition: float = Field(description="condition number of the system that was solved")


class ProjectionOut(BaseModel):
    tensor: str = Field(examples=["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"])
    relative_norm: float = Field(description="‖ΔW‖ / ‖W‖")


class CrossAttentionOut(BaseModel):
    """How edits were written into the U-Net's cross-attention."""

    erase_scale: float
    preserve_scale: float
    regularization_weight: float
    preserve: list[str]


class EvaluationLink(BaseModel):
    """Where to read what was drawn or measured of a version."""

    id: UUID
    kind: Literal["preview", "check", "evaluation"]
    state: str
    url: str = Field(examples=["/v1/models/emoji/checkpoints/v3/evaluations/019376f0-6f3c-7a10-8e25-3d2f6a1b9c04"])


class AliasOutcome(BaseModel):
    """What became of the alias that apply was asked to move."""

    name: str
    moved: bool
    detail: str


class CheckpointSummary(BaseModel):
    version: str = Field(examples=["v3"])
    model: str
    state: CheckpointState
    commit: str | None = Field(description="40 hex digits derived from all files that the revision serves")
    edit_count: int
    alpha: float | None = Field(
        description="null where no edit is in the memory, as are `residual_schedule`, `moment_weight` and `contexts`"
    )
    layers: list[int] = Field(description="edited layers of the first text encoder; `changed_layers` has all")
    aliases: list[str]
    notes: str | None
    parent: str | None = Field(description="the version that `from` named")
    created_by: str
    created_at: datetime
    published_at: datetime | None
    retracted_at: datetime | None


class CheckpointOut(CheckpointSummary):
    edits: list[EditInCheckpoint]
    residual_schedule: ResidualSchedule | None
    moment_weight: float | None
    contexts: Contexts | None
    preserve: list[str]
    cross_attention: CrossAttentionOut | None = Field(description="null where no edit is there")
    statistics: str | None = Field(description="digest of the second moments; null where no edit is in the memory")
    files: list[FileOut]
    conflicts: list[ConflictOut]
    warnings: list[EditWarning]
    evaluations: list[EvaluationLink] = Field(description="newest first, at most 100")
    changed_layers: list[LayerOut]
    changed_projections: list[ProjectionOut] = Field(description="of the U-Net's cross-attention")
    alias: AliasOutcome | None
    progress: Progress | None
    problem: dict[str, Any] | None = Field(description="why it failed or was retracted")


class ApplyPlan(BaseModel):
    """The answer to a dry run."""

    model: str
    edits: list[EditInCheckpoint]
    superseded: list[UUID] = Field(description="left out, since a newer edit has the same source")
    conflicts: list[ConflictOut]
    alpha: float | None
    layers: list[int] = Field(description="of the first text encoder")
    cross_attention: CrossAttentionOut | None
    statistics: str | None


class AliasOut(BaseModel):
    name: str
    version: str
    commit: str | None
    updated_at: datetime


class AliasPeriod(BaseModel):
    """Where an alias pointed for a while."""

    version: str | None = Field(description="null: there was no such alias, since it was deleted", examples=["v3"])
    commit: str | None
    since: datetime
    until: datetime | None = Field(description="null: to this day")
    moved_by: str = Field(description="who pointed it there; the audit log has the reason")


DateOrDateTime = Annotated[Annotated[date, BareDate] | Rfc3339DateTime, Field(union_mode="left_to_right")]


class AliasPut(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": "v3"}]})

    version: str = Field(pattern=VERSION)
    reason: Annotated[Text, Field(max_length=2_000)] | None = Field(None, description="why, for the audit log")


class Retraction(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"reason": "draws the wrong flag"}]})

    reason: Text = Field(min_length=1, max_length=4_000)


class LayerDifference(BaseModel):
    path: str
    tensor: str
    layer: int | None
    relative_norm: float = Field(description="‖W - W_against‖ / ‖W_against‖")


class FileDifference(BaseModel):
    path: str
    change: Literal["added", "removed", "changed"]
    sha256: str | None
    against_sha256: str | None


class DifferenceOut(BaseModel):
    version: str
    against: str
    added: list[EditInCheckpoint]
    removed: list[EditInCheckpoint]
    layers: list[LayerDifference] = Field(description="every tensor of the text encoders and of the U-Net that differs")
    files: list[FileDifference]


class FileOrigin(BaseModel):
    """One place that a file comes from."""

    model: str
    version: str | None = Field(description="null: a file of the base model")
    state: str
    path: str
    commit: str | None
    edits: list[EditInCheckpoint]
    evaluations: list[EvaluationLink] = Field([], description="newest first, at most 100")


class FileProvenance(BaseModel):
    sha256: str
    size: int
    origins: list[FileOrigin]
