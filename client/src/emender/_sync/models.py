# Written by client/generate_sync.py from emender/_async. Do not edit.
"""Base models, their second-moment statistics, and reference images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emender._sync.connection import Connection
from emender.pictures import Picture, encode_image
from emender.requests import Id, OnStatus, drop_none, url_path
from emender.schemas.common import WorkStatus
from emender.schemas.images import ImageOut
from emender.schemas.models import License, ModelOut, StatisticsOut

if TYPE_CHECKING:
    from PIL.Image import Image


class Models:
    """Base models."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def register(
        self,
        name: str,
        *,
        source: str,
        revision: str | None = None,
        namespace: str | None = None,
        classifier: str | None = None,
        license: License | None = None,
    ) -> ModelOut:
        """Register a model. A worker downloads and checks it: see `wait`.

        `source` is a hub id, or the name of a folder in a model root of the service.
        """
        body = drop_none(
            name=name, source=source, revision=revision, namespace=namespace, classifier=classifier, license=license
        )
        return self._connection.post(url_path("models"), ModelOut, json=body)

    def list(self) -> Iterator[ModelOut]:
        """List models, newest first."""
        return self._connection.pages(url_path("models"), ModelOut)

    def get(self, name: str, *, wait: int | None = None) -> ModelOut:
        """Read a model. `wait`: seconds to wait for its registration, at most 60."""
        return self._connection.get(url_path("models", name), ModelOut, wait=wait)

    def events(self, name: str) -> Iterator[WorkStatus]:
        """Follow the registration: its status at each change, until it has ended."""
        return self._connection.events(url_path("models", name))

    def delete(self, name: str) -> None:
        """Delete a model whose registration failed."""
        self._connection.delete(url_path("models", name))

    def wait(
        self, name: str, *, on_status: OnStatus | None = None, progress: bool = False, timeout: float | None = None
    ) -> ModelOut:
        """Wait until a model is ready. Raises `WorkFailed`, and `WaitTimeout` after `timeout` seconds."""
        return self._connection.wait(
            url_path("models", name),
            ModelOut,
            label=f"model {name}",
            on_status=on_status,
            progress=progress,
            timeout=timeout,
        )


class Statistics:
    """Second-moment statistics of a model's keys. Apply needs them once per model."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, model: str, *, captions: str | Sequence[str], samples: int | None = None) -> StatisticsOut:
        """Estimate statistics over captions, or over the list of captions of this name in a model root."""
        body = drop_none(captions=captions, samples=samples)
        return self._connection.post(url_path("models", model, "statistics"), StatisticsOut, json=body)

    def list(self, model: str) -> Iterator[StatisticsOut]:
        """List the statistics of a model, newest first."""
        return self._connection.pages(url_path("models", model, "statistics"), StatisticsOut)

    def get(self, model: str, statistics_id: Id, *, wait: int | None = None) -> StatisticsOut:
        """Read statistics. `wait`: seconds to wait for the estimate, at most 60."""
        return self._connection.get(url_path("models", model, "statistics", statistics_id), StatisticsOut, wait=wait)

    def events(self, model: str, statistics_id: Id) -> Iterator[WorkStatus]:
        """Follow the estimate: its status at each change, until it has ended."""
        return self._connection.events(url_path("models", model, "statistics", statistics_id))

    def wait(
        self,
        model: str,
        statistics_id: Id,
        *,
        on_status: OnStatus | None = None,
        progress: bool = False,
        timeout: float | None = None,
    ) -> StatisticsOut:
        """Wait until statistics are ready. Raises `WorkFailed`, and `WaitTimeout` after `timeout` seconds."""
        return self._connection.wait(
            url_path("models", model, "statistics", statistics_id),
            StatisticsOut,
            label=f"statistics of {model}",
            on_status=on_status,
            progress=progress,
            timeout=timeout,
        )


class Images:
    """Reference images, which can be the destination of an edit."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(self, image: "Path | bytes | Image") -> ImageOut:
        """Upload a PNG, JPEG or WebP file, its bytes, or a PIL image. Equal images have equal ids."""
        if isinstance(image, Path):
            file = (image.name, image.read_bytes())
        elif isinstance(image, bytes):
            file = ("image", image)
        else:
            file = ("image.png", encode_image(image))
        return self._connection.post(url_path("images"), ImageOut, files={"file": file})

    def get(self, image_id: str) -> ImageOut:
        """Read the size of an image."""
        return self._connection.get(url_path("images", image_id), ImageOut)

    def picture(self, image_id: str) -> Picture:
        """Download an image as the service stores it, a PNG. A notebook shows its thumbnail."""
        content = self._connection.read_file(url_path("images", image_id, "content"))
        return Picture(f"{image_id}.png", content)
