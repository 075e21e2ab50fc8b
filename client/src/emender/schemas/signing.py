"""The public keys that checkpoints were signed with."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class SigningKeyOut(BaseModel):
    """A public key that checkpoints were signed with."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(description="SHA-256 of the PEM; the `publicKey.hint` in `model.sig`", examples=["5f3c9a1b…"])
    algorithm: str = "ECDSA"
    public_key: str = Field(description="PEM")
    created_at: datetime = Field(description="when it was first used")
    last_used_at: datetime
