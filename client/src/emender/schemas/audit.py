"""Schemas of the audit log."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field


class AuditEventOut(BaseModel):
    """One change."""

    sequence: int
    at: datetime
    actor: str = Field(examples=["key:1f2e3d4c5b6a"])
    action: str = Field(examples=["edit.create"])
    target: str = Field(examples=["edit:0192d0e4-5a7b-7c3d-8e9f-0a1b2c3d4e5f"])
    details: dict[str, Any]
    before: dict[str, Any] | None = Field(description="changed fields before the change; null: the target was new")
    after: dict[str, Any] | None = Field(description="changed fields after the change; null: deleted or unchanged")
    reason: str | None = Field(description="reason that the caller gave")
    request_id: str | None = Field(description="`X-Request-ID` of the response; null: no request caused it")
    address: str | None = Field(description="address of the caller; behind a proxy see FORWARDED_ALLOW_IPS")
    previous_hash: str = Field(description="hash of the previous event, hex")
    hash: str = Field(description="sha256 over this event and the previous hash, hex")


class Verification(BaseModel):
    """The result of verifying the chain of hashes."""

    valid: bool
    events: int = Field(description="number of events verified")
    head: str | None = Field(description="hash of the last event; kept elsewhere, it detects a log cut at its end")
    broken_at: int | None = Field(default=None, description="sequence of the first event whose hash is wrong")
    reason: str | None = Field(default=None, description="what is wrong with it")
