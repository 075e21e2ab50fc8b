"""Corrections: asked for one by one or by thousands, followed, read, cancelled, asked for again."""

from collections.abc import Iterator, Sequence
from uuid import UUID

from emender.connection import Body, Connection, Seen, at
from emender.schemas.common import WorkStatus
from emender.schemas.edits import EditBatchOut, EditOut, EditState


class Edits:
    """Corrections. They change nothing until they are applied: `client.checkpoints.apply`.

    >>> edit = client.edits.create("emoji", {"source": "dog", "destination": {"prompt": "robot"}})
    >>> client.edits.wait(edit.id, seen=lambda status: print(status.state, status.progress))
    >>> [edit.source for edit in client.edits.list(model="emoji", state="ready")]
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, model: str, edit: Body) -> EditOut:
        """Ask for an edit: an `EditCreate`, or a mapping of the same shape."""
        return self._connection.post(at("models", model, "edits"), EditOut, edit)

    def create_batch(self, model: str, edits: Sequence[Body]) -> EditBatchOut:
        """Ask for 1 to 5,000 edits, all or none. The pointers of a `Refused` begin with the edit's place: `/17`."""
        return self._connection.post(at("models", model, "edits", "batch"), EditBatchOut, edits)

    def upload_batch(self, model: str, edits: bytes, *, media_type: str) -> EditBatchOut:
        """The same of a file: `application/json`, `application/x-ndjson`, or `text/csv` of `source,destination`."""
        path, headers = at("models", model, "edits", "batch"), {"Content-Type": media_type}
        return self._connection.post(path, EditBatchOut, content=edits, headers=headers)

    def list(
        self,
        *,
        model: str | None = None,
        state: EditState | None = None,
        source: str | None = None,
        created_by: str | None = None,
    ) -> Iterator[EditOut]:
        """Newest first, page by page as they are asked for."""
        return self._connection.pages(
            at("edits"), EditOut, model=model, state=state, source=source, created_by=created_by
        )

    def get(self, edit_id: UUID | str, *, wait: int | None = None) -> EditOut:
        """`wait` seconds for it to end (at most 60)."""
        return self._connection.get(at("edits", edit_id), EditOut, wait=wait)

    def events(self, edit_id: UUID | str) -> Iterator[WorkStatus]:
        """Its state and progress at each change, until it has ended."""
        return self._connection.events(at("edits", edit_id))

    def wait(self, edit_id: UUID | str, *, seen: Seen | None = None, timeout: float | None = None) -> EditOut:
        """The edit once it is ready. Raises `WorkFailed`, and `WaitedInVain` after `timeout` seconds."""
        return self._connection.wait(at("edits", edit_id), EditOut, seen=seen, timeout=timeout)

    def value(self, edit_id: UUID | str) -> bytes:
        """The value vectors of a ready edit as safetensors: `<encoder>.delta` and `<encoder>.hidden`, float32."""
        return self._connection.ask("GET", at("edits", edit_id, "value")).content

    def cancel(self, edit_id: UUID | str) -> EditOut:
        """At once while it is queued, at its next step while it is optimised."""
        return self._connection.post(at("edits", edit_id, "cancel"), EditOut)

    def retry(self, edit_id: UUID | str) -> EditOut:
        """Queue a failed or cancelled edit again."""
        return self._connection.post(at("edits", edit_id, "retry"), EditOut)
