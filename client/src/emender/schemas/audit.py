"""The audit log as clients see it."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field


class AuditEventOut(BaseModel):
    sequence: int
    at: datetime
    actor: str = Field(examples=["key:1f2e3d4c5b6a"])
    action: str = Field(examples=["edit.create"])
    target: str = Field(examples=["edit:0192d0e4-5a7b-7c3d-8e9f-0a1b2c3d4e5f"])
    details: dict[str, Any]
    before: dict[str, Any] | None = Field(description="what changed of the target, as it was; null: it was not there")
    after: dict[str, Any] | None = Field(description="and as it is; null: it is gone, or nothing changed")
    reason: str | None = Field(description="as whoever did it gave it")
    request_id: str | None = Field(description="the `X-Request-ID` of the answer; null: no request did it")
    address: str | None = Field(description="that the request came from; behind a proxy see FORWARDED_ALLOW_IPS")
    previous_hash: str = Field(description="hex; of the event before")
    hash: str = Field(description="hex sha256 over this event and the hash before")


class Verification(BaseModel):
    """Whether each event still carries the hash of the one before."""

    valid: bool
    events: int = Field(description="how many were checked")
    head: str | None = Field(description="hash of the last event: keep it elsewhere to notice a log cut short")
    broken_at: int | None = Field(None, description="sequence of the first event that does not fit")
    reason: str | None = Field(None, description="what does not fit there")
