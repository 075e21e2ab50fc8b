"""Schemas of API keys."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from emender.schemas.text import Text
from emender.schemas.timestamps import Rfc3339DateTime

Scope = Literal["read", "edit", "apply", "admin"]


class ApiKeyCreate(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"name": "release pipeline", "scopes": ["read", "apply"]}}
    )

    name: Annotated[Text, Field(min_length=1, max_length=200, description="user or purpose of the key")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4, description="`admin` includes the others")]
    expires_at: Annotated[Rfc3339DateTime | None, Field(description="end of its validity; null: never")] = None


class ApiKeyOut(BaseModel):
    """A key without its secret, which is not stored."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    name: str
    prefix: str = Field(description="public part; audit events name the key as `key:<prefix>`")
    scopes: list[Scope]
    created_at: datetime
    last_used_at: datetime | None = Field(description="to the minute")
    expires_at: datetime | None
    revoked_at: datetime | None


class ApiKeyCreated(ApiKeyOut):
    token: str | None = Field(
        description="`em_<prefix>_<secret>`, returned only once; null in a response that an Idempotency-Key replays"
    )
