"""Base models, their statistics, and reference images."""

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from emender.connection import Body, Connection, Seen, at
from emender.schemas.common import WorkStatus
from emender.schemas.images import ImageOut
from emender.schemas.models import ModelOut, StatisticsOut


class Models:
    """Base models.

    >>> client.models.register({"name": "emoji", "source": "pipeline"})
    >>> client.models.wait("emoji").digest
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def register(self, model: Body) -> ModelOut:
        """Ask a worker to fetch and check a model: a `ModelCreate`, or a mapping of the same shape."""
        return self._connection.post(at("models"), ModelOut, model)

    def list(self) -> Iterator[ModelOut]:
        """Newest first."""
        return self._connection.pages(at("models"), ModelOut)

    def get(self, name: str, *, wait: int | None = None) -> ModelOut:
        """`wait` seconds for its registration to end (at most 60)."""
        return self._connection.get(at("models", name), ModelOut, wait=wait)

    def events(self, name: str) -> Iterator[WorkStatus]:
        """The state and progress of its registration at each change, until it has ended."""
        return self._connection.events(at("models", name))

    def wait(self, name: str, *, seen: Seen | None = None, timeout: float | None = None) -> ModelOut:
        """The model once it is ready. Raises `WorkFailed`, and `WaitedInVain` after `timeout` seconds."""
        return self._connection.wait(at("models", name), ModelOut, seen=seen, timeout=timeout)


class StatisticsOfModels:
    """Second moments of a model's keys, over captions; apply needs them once a model.

    >>> made = client.statistics.create("emoji", {"captions": ["a red fox", "a pale jug"]})
    >>> client.statistics.wait("emoji", made.id).tokens
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, model: str, statistics: Body) -> StatisticsOut:
        """Ask for an estimate: a `StatisticsCreate`, or a mapping of the same shape."""
        return self._connection.post(at("models", model, "statistics"), StatisticsOut, statistics)

    def list(self, model: str) -> Iterator[StatisticsOut]:
        """Newest first."""
        return self._connection.pages(at("models", model, "statistics"), StatisticsOut)

    def get(self, model: str, statistics_id: UUID | str, *, wait: int | None = None) -> StatisticsOut:
        """`wait` seconds for the estimate to end (at most 60)."""
        return self._connection.get(at("models", model, "statistics", statistics_id), StatisticsOut, wait=wait)

    def events(self, model: str, statistics_id: UUID | str) -> Iterator[WorkStatus]:
        """The state and progress of the estimate at each change, until it has ended."""
        return self._connection.events(at("models", model, "statistics", statistics_id))

    def wait(
        self, model: str, statistics_id: UUID | str, *, seen: Seen | None = None, timeout: float | None = None
    ) -> StatisticsOut:
        """The estimate once it is ready. Raises `WorkFailed`, and `WaitedInVain` after `timeout` seconds."""
        path = at("models", model, "statistics", statistics_id)
        return self._connection.wait(path, StatisticsOut, seen=seen, timeout=timeout)


class Images:
    """Reference images, which an edit may show its source by.

    >>> image = client.images.upload(Path("robot.png"))
    >>> client.edits.create("emoji", {"source": "dog", "destination": {"images": [image.id]}})
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(self, image: Path | bytes) -> ImageOut:
        """PNG, JPEG or WebP. The same image gives the same id."""
        file = ("image", image) if isinstance(image, bytes) else (image.name, image.read_bytes())
        return self._connection.post(at("images"), ImageOut, files={"file": file})

    def get(self, image_id: str) -> ImageOut:
        """What is known of it."""
        return self._connection.get(at("images", image_id), ImageOut)

    def content(self, image_id: str) -> bytes:
        """The PNG that is kept of it."""
        return self._connection.ask("GET", at("images", image_id, "content")).content
