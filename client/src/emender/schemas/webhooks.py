"""Webhooks as clients ask for them and see them."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from emender.schemas.text import Text

EventType = Literal["edit.ready", "edit.failed", "checkpoint.published", "alias.moved"]
DeliveryState = Literal["pending", "delivered", "failed"]


def _each_once(events: list[EventType]) -> list[EventType]:
    return sorted(set(events))


Url = Annotated[
    Text,
    Field(
        description="https, or http in EMENDER_WEBHOOK_ALLOWED_NETWORKS; addresses are checked at delivery",
        examples=["https://deploy.example/emender"],
    ),
]
Events = Annotated[
    list[EventType], Field(min_length=1, max_length=8, description="what is sent"), AfterValidator(_each_once)
]
Description = Annotated[Text, Field(max_length=200, description="who receives it, and what for")]


class WebhookCreate(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "url": "https://deploy.example/emender",
                "events": ["checkpoint.published", "alias.moved"],
                "description": "rolls production out",
            }
        },
    )

    url: Url
    events: Events
    description: Description | None = None


class WebhookUpdate(BaseModel):
    """What is to change; what is null or left out stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"enabled": True}})

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = Field(
        None, description="disabling ends what is still to be sent; enabling sends what is new"
    )

    @model_validator(mode="after")
    def something(self) -> "WebhookUpdate":
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("must change something: url, events, description or enabled")
        return self


class WebhookOut(BaseModel):
    """A webhook without its secret, which is kept nowhere."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    url: str
    events: list[EventType]
    description: str | None
    enabled: bool
    disabled_reason: str | None = Field(description="why, where the service or an admin disabled it")
    failing_since: datetime | None = Field(description="the first failure after the last success")
    created_by: str
    created_at: datetime


class WebhookListed(WebhookOut):
    signable: bool = Field(
        description="whether it was made with this service's webhook key; if not, nothing is sent until its secret is "
        "rotated"
    )


class WebhookCreated(WebhookListed):
    secret: str | None = Field(
        description="`whsec_…`, shown in this answer only; null where an Idempotency-Key replays it. With it receivers "
        "verify signatures (standardwebhooks.com)"
    )


class AttemptOut(BaseModel):
    """One try, as far as it was seen to its end: a number left out was lost with its worker."""

    number: int
    at: datetime
    seconds: float
    status: int | None = Field(description="of the answer")
    error: str | None = Field(description="why there was none")
    excerpt: str | None = Field(description="how the answer's body begins")


class DeliveryOut(BaseModel):
    id: UUID
    event: str = Field(examples=["checkpoint.published"])
    message_id: str = Field(description="sent as `webhook-id`; the same at each try, and when it is sent again")
    state: DeliveryState
    tries: int
    next_try_at: datetime | None = Field(description="null once it has ended")
    attempts: list[AttemptOut]
    created_at: datetime
    ended_at: datetime | None
