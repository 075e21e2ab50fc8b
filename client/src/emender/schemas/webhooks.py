"""Schemas of webhooks."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from emender.schemas.text import Text

EventType = Literal["edit.ready", "edit.failed", "checkpoint.published", "alias.moved"]
DeliveryState = Literal["pending", "delivered", "failed"]


def _deduplicate(events: list[EventType]) -> list[EventType]:
    return sorted(set(events))


Url = Annotated[
    Text,
    Field(
        description="https, or http in EMENDER_WEBHOOK_ALLOWED_NETWORKS; addresses are checked at delivery",
        examples=["https://deploy.example/emender"],
    ),
]
Events = Annotated[
    list[EventType],
    Field(min_length=1, max_length=8, description="types of events to send"),
    AfterValidator(_deduplicate),
]
Description = Annotated[Text, Field(max_length=200, description="receiver and its purpose")]


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
    """The fields to change. Those that are null or missing stay."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"enabled": True}})

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: Annotated[bool | None, Field(description="false drops pending deliveries; true sends later events")] = None

    @model_validator(mode="after")
    def require_change(self) -> "WebhookUpdate":
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("must change url, events, description or enabled")
        return self


class WebhookOut(BaseModel):
    """A webhook without its secret, which is not stored."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    url: str
    events: list[EventType]
    description: str | None
    enabled: bool
    disabled_reason: str | None = Field(description="why it is disabled")
    failing_since: datetime | None = Field(description="first failure after the last success")
    created_by: str
    created_at: datetime


class WebhookListed(WebhookOut):
    signable: bool = Field(
        description="whether it was created with the service's present webhook key; if not, nothing is sent until its "
        "secret is rotated"
    )


class WebhookCreated(WebhookListed):
    secret: str | None = Field(
        description="`whsec_…`, with which receivers verify signatures (standardwebhooks.com). Returned only once; "
        "null in a response that an Idempotency-Key replays"
    )


class AttemptOut(BaseModel):
    """An attempt that ended. A missing number was lost with its worker."""

    number: int
    at: datetime
    seconds: float
    status: int | None = Field(description="status of the response")
    error: str | None = Field(description="why there was no response")
    excerpt: str | None = Field(description="beginning of the response's body")


class DeliveryOut(BaseModel):
    """An event for one webhook."""

    id: UUID
    event: str = Field(examples=["checkpoint.published"])
    message_id: str = Field(description="`webhook-id` of the request; the same at each attempt and redelivery")
    state: DeliveryState
    tries: int
    next_try_at: datetime | None = Field(description="null once it has ended")
    attempts: list[AttemptOut]
    created_at: datetime
    ended_at: datetime | None
