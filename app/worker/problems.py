"""What a failed job leaves in its row: a title, a detail that says what to do, and the fields to blame."""

import re

from app.db.models import JsonObject
from app.storage.local import BlobCorrupt, BlobMissing
from editing.errors import EditingError

INTERNAL: JsonObject = {
    "title": "Internal error",
    "detail": "Something went wrong in the worker; its log has the details. Retry, or report it.",
    "errors": [],
}


def problem_of(error: EditingError) -> JsonObject:
    """The error's class as a title (`InvalidPrompt`: "Invalid prompt"), its detail, and the field it names, if any."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__)
    errors = [{"pointer": error.pointer, "detail": error.detail}] if error.pointer else []
    return {"title": words.capitalize(), "detail": error.detail, "errors": errors}


def damaged(error: BlobMissing | BlobCorrupt) -> JsonObject:
    """A blob that the work needs is gone or has other bytes than its sha256 says."""
    what = "is missing from the store" if isinstance(error, BlobMissing) else "has other bytes than its sha256 says"
    detail = f"The blob {error} {what}: restore it from a backup, or register or upload its source again."
    return {"title": "Damaged store", "detail": detail, "errors": []}


def no_room(error: OSError) -> JsonObject:
    """The operating system refused; its reason, without the paths of the worker's machine."""
    detail = (
        f"The worker could not read or write its files: {error.strerror or type(error).__name__}. Retry once mended."
    )
    return {"title": "Storage failed", "detail": detail, "errors": []}
