"""Errors of reference images."""

from app.problems import NotFound


class ImageNotFound(NotFound):
    def __init__(self, image_id: str) -> None:
        super().__init__(f"There is no image {image_id}.")
