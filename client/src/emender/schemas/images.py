"""Schemas of reference images."""

from datetime import datetime

from pydantic import BaseModel, Field


class ImageOut(BaseModel):
    """A reference image, stored as a PNG without metadata."""

    id: str = Field(examples=["sha256:" + "0" * 64], description="sha256 of the stored PNG")
    width: int
    height: int
    size: int = Field(description="bytes of the PNG")
    created_by: str = Field(description="first uploader")
    created_at: datetime
