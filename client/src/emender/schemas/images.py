"""Reference images as clients see them."""

from datetime import datetime

from pydantic import BaseModel, Field


class ImageOut(BaseModel):
    id: str = Field(examples=["sha256:" + "0" * 64], description="of the image as we keep it: a PNG without metadata")
    width: int
    height: int
    size: int = Field(description="bytes of the PNG")
    created_by: str = Field(description="who first uploaded it")
    created_at: datetime
