"""Public keys as clients see them."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class SigningKeyOut(BaseModel):
    """A key that versions were signed with; its private half is nowhere in the service's database."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="by which `manifest.sig` names it", examples=["5f3c9a1be0d24477"])
    algorithm: str = "Ed25519"
    public_key: str = Field(description="PEM")
    created_at: datetime = Field(description="when it was first used here")
    last_used_at: datetime
