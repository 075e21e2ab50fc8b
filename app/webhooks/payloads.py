"""The bodies of events: ids, names and where to read the rest; no secrets. OpenAPI documents these models."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, Field

from emender.schemas.common import ProblemNote

Path = Annotated[str, Field(description="path below the service's URL where the rest is read")]


class EditEnded(BaseModel):
    id: UUID
    model: str
    source: str
    state: Literal["ready", "failed"]
    problem: ProblemNote | None = Field(description="why it failed")
    path: Path = Field(examples=["/v1/edits/0192d0e4-5a7b-7c3d-8e9f-0a1b2c3d4e5f"])


class CheckpointPublished(BaseModel):
    model: str = Field(examples=["emoji"])
    version: str = Field(examples=["v3"])
    commit: str
    path: Path = Field(examples=["/v1/models/emoji/checkpoints/v3"])


class AliasMoved(BaseModel):
    """`to` is null if the alias was deleted, `from` if it was created."""

    model: str = Field(examples=["emoji"])
    alias: str = Field(examples=["production"])
    from_: str | None = Field(alias="from", examples=["v2"])
    to: str | None = Field(examples=["v3"])
    moved_by: str = Field(examples=["key:1f2e3d4c5b6a"])
    path: Path = Field(examples=["/v1/models/emoji/aliases/production"])


class Ping(BaseModel):
    webhook: UUID


class Event(BaseModel):
    """The fields of every event: `type`, `timestamp` (RFC 3339, UTC: when it happened) and `data`."""

    timestamp: datetime


class EditReadyEvent(Event):
    """An edit is ready."""

    type: Literal["edit.ready"] = "edit.ready"
    data: EditEnded


class EditFailedEvent(Event):
    """An edit failed; its problem says why."""

    type: Literal["edit.failed"] = "edit.failed"
    data: EditEnded


class CheckpointPublishedEvent(Event):
    """A checkpoint was published."""

    type: Literal["checkpoint.published"] = "checkpoint.published"
    data: CheckpointPublished


class AliasMovedEvent(Event):
    """An alias was moved, by apply too, or deleted."""

    type: Literal["alias.moved"] = "alias.moved"
    data: AliasMoved


class PingEvent(Event):
    """Sent on `POST /v1/webhooks/{webhook_id}/test`."""

    type: Literal["webhook.ping"] = "webhook.ping"
    data: Ping


AnyEvent = EditReadyEvent | EditFailedEvent | CheckpointPublishedEvent | AliasMovedEvent | PingEvent


def body_of(event: AnyEvent) -> str:
    """Return the event as it is signed and sent."""
    return event.model_dump_json(by_alias=True)
