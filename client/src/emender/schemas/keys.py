"""API keys as clients see them."""

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

    name: Annotated[Text, Field(min_length=1, max_length=200, description="who or what uses the key")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4, description="`admin` includes the others")]
    expires_at: Annotated[
        Rfc3339DateTime | None, Field(description="from when on the key is refused; null: it never expires")
    ] = None


class ApiKeyOut(BaseModel):
    """A key without its secret, which is kept nowhere."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    name: str
    prefix: str = Field(description="the public half; audit events name the key by it: `key:<prefix>`")
    scopes: list[Scope]
    created_at: datetime
    last_used_at: datetime | None = Field(description="to the minute")
    expires_at: datetime | None
    revoked_at: datetime | None


class ApiKeyCreated(ApiKeyOut):
    token: str | None = Field(
        description="`em_<prefix>_<secret>`, shown in this answer only; null where an Idempotency-Key replays it"
    )
