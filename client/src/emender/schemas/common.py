"""What the schemas of several nouns share. Free of the framework and of the database, so that clients may have them."""

from typing import Generic, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")

PROBLEM_TYPES = "https://emender.dev/problems/"

SUCCEEDED = frozenset({"ready", "published"})
ENDED = SUCCEEDED | {"failed", "cancelled", "retracted"}
"""States, of whatever noun, in which no work is left to be done."""


class FieldError(BaseModel):
    """One rejected part of a body."""

    pointer: str = Field(description="JSON Pointer (RFC 6901) into the body, or the name of the parameter")
    detail: str


class ProblemDocument(BaseModel):
    """The shape of every error answer (RFC 9457)."""

    type: str = Field(examples=[PROBLEM_TYPES + "edit-not-found"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="the path of the request")
    errors: list[FieldError] = Field(default=[], description="for a rejected body: what, where")


class ProblemNote(BaseModel):
    """Why something failed, as its row keeps it."""

    title: str
    detail: str
    errors: list[FieldError] = []


class Progress(BaseModel):
    """How far a running job is."""

    stage: str = Field(description="what the worker is doing now", examples=["optimizing"])
    done: int = Field(description="steps of this stage that are done")
    total: int = Field(description="steps of this stage; 1 for a stage that is not counted")
    text_loss: float | None = Field(None, description="current text loss of an edit")
    noise_loss: float | None = Field(None, description="current noise loss of an edit")


class WorkStatus(BaseModel):
    """What `…/events` sends of a model, statistics, an edit, a checkpoint or an evaluation: the state now, and how far
    the work is."""

    id: UUID
    state: str
    attempt: int = Field(description="how often a worker took it up since it was last asked for")
    progress: Progress | None = Field(description="while a worker runs the job")
    problem: ProblemNote | None


class FileOut(BaseModel):
    """A file of a checkpoint or of an evaluation."""

    model_config = ConfigDict(from_attributes=True)

    path: str
    sha256: str
    size: int = Field(description="bytes")


class Page(BaseModel, Generic[Item]):
    """A keyset page, newest first."""

    items: list[Item]
    next: str | None = Field(description="cursor of the next page; null on the last")
