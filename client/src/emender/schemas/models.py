"""Schemas of base models and their statistics."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, WrapValidator, model_validator

from emender.schemas.checkpoints import Method
from emender.schemas.common import ProblemNote, Progress
from emender.schemas.names import Name, is_part
from emender.schemas.text import Text

ModelState = Literal["registering", "ready", "failed"]
StatisticsState = Literal["queued", "estimating", "ready", "failed"]

MAX_CAPTIONS = 100_000


def _check_source(source: str) -> str:
    parts = source.split("/")
    if len(parts) > 2 or not all(is_part(part) for part in parts):
        raise ValueError("must be a hub id such as stabilityai/sd-turbo, or the name of a folder in a model root")
    return source


class License(BaseModel):
    """A license, as in the metadata of the Hub's model cards."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$",
            description="`license` of a model card; `other` requires a name and a link",
            examples=["creativeml-openrail-m"],
        ),
    ]
    name: Annotated[Text, Field(max_length=200, description="`license_name`")] | None = None
    link: Annotated[Text, Field(max_length=500, description="`license_link`")] | None = None


class ModelCreate(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"name": "emoji", "source": "emoji"}})

    name: Annotated[Name, Field(description="unique name of the model")]
    source: Annotated[
        str,
        Field(max_length=193, description="hub id `namespace/name`, or name of a folder in EMENDER_MODEL_ROOTS"),
        AfterValidator(_check_source),
    ]
    revision: Annotated[
        str | None,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$", description="branch, tag or commit of a hub id"),
    ] = None
    namespace: Annotated[
        Name | None, Field(description="namespace in the Hub's protocol; default: EMENDER_NAMESPACE")
    ] = None
    classifier: Annotated[
        Annotated[str, Field(max_length=193), AfterValidator(_check_source)] | None,
        Field(
            description="classifier of the model's pictures in checks and evaluations: the name of an installed "
            "classifier, or an image-classification model of transformers by its hub id or the name of its folder in "
            "EMENDER_MODEL_ROOTS",
            examples=["emoji", "google/vit-base-patch16-224"],
        ),
    ] = None
    license: Annotated[
        License | None,
        Field(description="license of its checkpoints, for their model cards; default: that of the model's README.md"),
    ] = None

    @model_validator(mode="after")
    def require_hub_id_for_revision(self) -> "ModelCreate":
        if self.revision is not None and "/" not in self.source:
            raise ValueError("only a hub id has a revision; a folder has none")
        return self


class EncoderOut(BaseModel):
    """A text encoder of a model."""

    name: str = Field(examples=["text_encoder"])
    layers: int
    width: int
    mlp_width: int = Field(description="inner width of each MLP, and of its keys")


class StatisticsOut(BaseModel):
    """Second moments C0 of a model's keys."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    state: StatisticsState
    captions_name: str
    captions_sha256: str | None
    captions: int | None = Field(description="number of captions")
    tokens: int | None = Field(description="number of keys; null until ready")
    truncated: int | None = Field(
        default=None,
        description="number of captions that are longer than the model reads, as its tokenizer truncates them; null "
        "until ready and for shipped statistics",
    )
    digest: str | None = Field(description="sha256 of the tensors; null until ready")
    progress: Progress | None = None
    problem: ProblemNote | None
    created_by: str
    created_at: datetime


class ModelOut(BaseModel):
    """A base model."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    name: str
    namespace: str
    source: str
    revision: str | None
    classifier: str | None = Field(description="classifier of its pictures; null: none")
    license: License | None = Field(description="license as registered, else of its model card; null: unknown")
    state: ModelState
    family: str | None = Field(description="null until ready")
    encoders: list[EncoderOut]
    methods: list[Method] = Field(
        default=[],
        description="where its edits can be written: values of `method` of an apply; empty until ready",
        examples=[["text_encoder", "cross_attention"]],
    )
    digest: str | None = Field(description="sha256 over the model's files; null until ready")
    statistics: StatisticsOut | None = Field(default=None, description="the latest ready statistics, else the latest")
    progress: Progress | None = None
    problem: ProblemNote | None
    created_by: str
    created_at: datetime


Caption = Annotated[Text, Field(min_length=1)]
CaptionsName = Annotated[str, Field(max_length=96, pattern="^[A-Za-z0-9._-]+$")]
Captions = Annotated[list[Caption], Field(min_length=1, max_length=MAX_CAPTIONS)]
_NAME, _LIST = TypeAdapter(CaptionsName), TypeAdapter(Captions)


def _validate_captions(captions: object, _: object) -> str | list[str]:
    """Validate one of the two, so that the pointer of an error names no branch of a union."""
    return _NAME.validate_python(captions) if isinstance(captions, str) else _LIST.validate_python(captions)


class StatisticsCreate(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"captions": "captions", "samples": 5000}})

    captions: Annotated[
        CaptionsName | Captions,
        WrapValidator(_validate_captions),
        Field(
            description="captions, each truncated as the tokenizer truncates prompts, or the name of a list "
            "`<name>.txt` in a model root, with one caption per line"
        ),
    ]
    samples: Annotated[int, Field(ge=1, le=MAX_CAPTIONS, description="number of captions to use, from the first")] = (
        MAX_CAPTIONS
    )
