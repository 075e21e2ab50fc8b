"""Schemas that several resources share."""

from typing import Generic, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")

PROBLEM_TYPES = "https://emender.dev/problems/"

SUCCEEDED = frozenset({"ready", "published"})
ENDED = SUCCEEDED | {"failed", "cancelled", "retracted"}
"""States in which a resource has no work left."""


class FieldError(BaseModel):
    """One invalid field of a request."""

    pointer: str = Field(description="JSON Pointer (RFC 6901) into the body, or the name of the parameter")
    detail: str


class ProblemDocument(BaseModel):
    """The body of every error response (RFC 9457)."""

    type: str = Field(examples=[PROBLEM_TYPES + "edit-not-found"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="path of the request")
    errors: list[FieldError] = Field(default=[], description="invalid fields of the request")


class ProblemNote(BaseModel):
    """The reason why the work of a resource failed."""

    title: str
    detail: str
    errors: list[FieldError] = []


class Progress(BaseModel):
    """How far a running job is."""

    stage: str = Field(description="what the worker is doing now", examples=["optimizing"])
    done: int = Field(description="steps of this stage that are done")
    total: int = Field(description="steps of this stage; 1 for a stage that is not counted")
    text_loss: float | None = Field(default=None, description="current text loss of an edit")
    noise_loss: float | None = Field(default=None, description="current noise loss of an edit")


class WorkStatus(BaseModel):
    """The data of an event of `…/events`: state and progress of a resource."""

    id: UUID
    state: str
    attempt: int = Field(description="number of attempts since the work was last requested")
    progress: Progress | None = Field(description="while a worker runs the job")
    problem: ProblemNote | None


class FileOut(BaseModel):
    """A file of a checkpoint or of an evaluation."""

    model_config = ConfigDict(from_attributes=True)

    path: str
    sha256: str
    size: int = Field(description="bytes")


class Page(BaseModel, Generic[Item]):
    """One page of a list, newest first."""

    items: list[Item]
    next: str | None = Field(description="cursor of the next page; null on the last page")
