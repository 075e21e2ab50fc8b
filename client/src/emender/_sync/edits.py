# Written by client/generate_sync.py from emender/_async. Do not edit.
"""Edits, one by one or in batches."""

from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Literal

from emender._sync.connection import Connection
from emender.errors import WaitTimeout
from emender.parameters import build_destination
from emender.pictures import Picture, Pictures
from emender.requests import Body, Id, OnStatus, drop_none, url_path
from emender.schemas.common import ENDED, WorkStatus
from emender.schemas.edits import Destination, EditBatchOut, EditOut, EditState, StageOneSettings

POLL_SECONDS = 10


class Edits:
    """Edits. They change no checkpoint until they are applied: see `client.checkpoints.apply`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        model: str,
        *,
        source: str,
        destination: str | Destination,
        templates: Sequence[str] | None = None,
        settings: StageOneSettings | None = None,
        reason: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> EditOut:
        """Create an edit. A worker optimizes its value: see `wait`.

        A text as `destination` is a prompt. `Destination` has the others: `Destination(images=[…])`,
        `Destination(erase=True)`, `Destination(balance={…})`.
        """
        body = drop_none(
            source=source,
            destination=build_destination(destination),
            templates=templates,
            settings=settings,
            reason=reason,
            labels=labels,
        )
        return self._connection.post(url_path("models", model, "edits"), EditOut, json=body)

    def create_batch(self, model: str, edits: Sequence[Body]) -> EditBatchOut:
        """Create 1 to 5,000 edits, all or none: `EditCreate`s, or mappings of the same shape.

        The pointers of a `ValidationFailed` begin with the index of the edit: `/17/source`.
        """
        path = url_path("models", model, "edits", "batch")
        return self._connection.post(path, EditBatchOut, json=list(edits))

    def upload_batch(
        self,
        model: str,
        content: bytes,
        *,
        media_type: Literal["application/json", "application/x-ndjson", "text/csv"],
    ) -> EditBatchOut:
        """Create the edits of a file. A CSV file has the columns `source` and `destination`."""
        path, headers = url_path("models", model, "edits", "batch"), {"Content-Type": media_type}
        return self._connection.post(path, EditBatchOut, content=content, headers=headers)

    def list(
        self,
        *,
        model: str | None = None,
        state: EditState | None = None,
        source: str | None = None,
        created_by: str | None = None,
    ) -> Iterator[EditOut]:
        """List edits, newest first."""
        return self._connection.pages(
            url_path("edits"), EditOut, model=model, state=state, source=source, created_by=created_by
        )

    def get(self, edit_id: Id, *, wait: int | None = None) -> EditOut:
        """Read an edit. `wait`: seconds to wait for its optimization, at most 60."""
        return self._connection.get(url_path("edits", edit_id), EditOut, wait=wait)

    def events(self, edit_id: Id) -> Iterator[WorkStatus]:
        """Follow the optimization: its status at each change, until it has ended."""
        return self._connection.events(url_path("edits", edit_id))

    def wait(
        self,
        edit_id: Id,
        *,
        on_status: OnStatus | None = None,
        progress: bool = False,
        timeout: float | None = None,
    ) -> EditOut:
        """Wait until an edit is ready. Raises `WorkFailed`, and `WaitTimeout` after `timeout` seconds."""
        return self._connection.wait(
            url_path("edits", edit_id),
            EditOut,
            label=f"edit {edit_id}",
            on_status=on_status,
            progress=progress,
            timeout=timeout,
        )

    def wait_batch(self, batch: EditBatchOut, *, timeout: float | None = None) -> Sequence[EditOut]:
        """Wait until every edit of a batch has ended, and return them in order, the failed ones included.

        Raises `WaitTimeout` after `timeout` seconds.
        """
        deadline = None if timeout is None else monotonic() + timeout
        edits: list[EditOut] = []
        for created in batch.edits:
            edit = self.get(created.id, wait=POLL_SECONDS)
            while edit.state not in ENDED:
                if deadline is not None and monotonic() > deadline:
                    raise WaitTimeout(f"{len(batch.edits) - len(edits)} of {batch.count} edits have not ended.")
                edit = self.get(created.id, wait=POLL_SECONDS)
            edits.append(edit)
        return edits

    def pictures(self, edit_id: Id) -> Pictures:
        """Download the reference images of an edit's destination. A notebook shows their thumbnails."""
        edit = self.get(edit_id)
        pictures = []
        for image_id in edit.destination.get("images", ()):
            content = self._connection.read_file(url_path("images", image_id, "content"))
            pictures.append(Picture(f"{image_id}.png", content))
        return Pictures(pictures)

    def value(self, edit_id: Id) -> bytes:
        """Download the value of a ready edit: safetensors with `<encoder>.delta` and `<encoder>.hidden`, float32."""
        return self._connection.read_file(url_path("edits", edit_id, "value"))

    def cancel(self, edit_id: Id) -> EditOut:
        """Cancel an edit: at once if it is queued, else at the next step."""
        return self._connection.post(url_path("edits", edit_id, "cancel"), EditOut)

    def retry(self, edit_id: Id) -> EditOut:
        """Queue a failed or cancelled edit again."""
        return self._connection.post(url_path("edits", edit_id, "retry"), EditOut)
