"""Why an edit cannot be read or changed."""

from uuid import UUID

from app.problems import Conflict, NotFound


class EditNotFound(NotFound):
    title = "Edit not found"

    def __init__(self, edit_id: UUID) -> None:
        super().__init__(f"There is no edit {edit_id}.")


class EditNotReady(Conflict):
    title = "Edit not ready"

    def __init__(self, edit_id: UUID, state: str) -> None:
        super().__init__(f"The edit {edit_id} is {state}; it has a value once it is ready.")


class EditAlreadyFinished(Conflict):
    def __init__(self, edit_id: UUID, state: str) -> None:
        super().__init__(f"The edit {edit_id} is {state}, so it cannot be cancelled.")


class EditNotRetryable(Conflict):
    title = "Edit not retryable"

    def __init__(self, edit_id: UUID, state: str) -> None:
        super().__init__(f"The edit {edit_id} is {state}; only a failed or cancelled edit can be retried.")
