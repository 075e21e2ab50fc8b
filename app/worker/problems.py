"""The problem of a failed job: a title, a detail that says what to do, and the invalid fields."""

import re

from app.db.models import JsonObject
from app.storage.store import BlobCorrupt, BlobMissing
from editing.errors import EditingError

INTERNAL: JsonObject = {
    "title": "Internal error",
    "detail": "Something went wrong in the worker; its log has the details. Retry, or report it.",
    "errors": [],
}


def problem_of(error: Exception) -> JsonObject:
    """Return the problem of an error. Only errors of the method keep their text: others may name the machine."""
    match error:
        case EditingError(detail=str(detail), pointer=str(pointer)):
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__)  # InvalidPrompt: "Invalid prompt"
            errors = [{"pointer": pointer, "detail": detail}] if pointer else []
            return {"title": words.capitalize(), "detail": detail, "errors": errors}
        case BlobMissing() | BlobCorrupt():
            what = "is missing from the store" if isinstance(error, BlobMissing) else "does not match its sha256"
            detail = f"The blob {error} {what}: restore it from a backup, or register or upload its source again."
            return {"title": "Damaged store", "detail": detail, "errors": []}
        case OSError(strerror=str(reason)):
            detail = f"The worker could not read or write its files: {reason}. Retry once this is fixed."
            return {"title": "Storage failed", "detail": detail, "errors": []}
        case _:
            return INTERNAL
