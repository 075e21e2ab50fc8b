"""Why an edit cannot be had, or not be changed."""

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
        super().__init__(f"The edit {edit_id} is {state} already: there is nothing to cancel.")


class EditNotRetryable(Conflict):
    title = "Edit not retryable"

    def __init__(self, edit_id: UUID, state: str) -> None:
        super().__init__(f"The edit {edit_id} is {state}; only a failed or cancelled one can be retried.")
