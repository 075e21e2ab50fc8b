"""What a failed job leaves in its row: a title, a detail that says what to do, and the fields to blame."""

import re

from app.db.models import JsonObject
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
