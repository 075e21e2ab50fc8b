"""A batch of edits in the three forms in which clients have them: a JSON list, NDJSON, or CSV."""

import io
import json
from typing import Annotated, Any

from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError

from app.api import strict_json
from app.problems import MalformedBody, Unprocessable, UnsupportedMedia
from emender.schemas.edits import EXAMPLE, MAX_BATCH, EditCreate
from emender.tables import TableError, read_table

HEADER = ["source", "destination"]
NDJSON = ("application/x-ndjson", "application/jsonl")
EDITS: TypeAdapter[list[EditCreate]] = TypeAdapter(
    Annotated[list[EditCreate], Field(min_length=1, max_length=MAX_BATCH)]
)
BODY: dict[str, Any] = {
    "required": True,
    "description": f"1 to {MAX_BATCH} edits. CSV has the columns source and destination, a prompt; separated by "
    "commas, semicolons or tabs.",
    "content": {
        "application/json": {
            "schema": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_BATCH,
                "items": {"$ref": "#/components/schemas/EditCreate"},
            },
            "example": [EXAMPLE],
        },
        NDJSON[0]: {"schema": {"type": "string"}, "example": '{"source": "dog", "destination": {"prompt": "cat"}}\n'},
        "text/csv": {"schema": {"type": "string"}, "example": "source,destination\nUS president,Joe Biden\n"},
    },
}


def parse(body: bytes, *, media_type: str) -> list[EditCreate]:
    """Parse the edits of a body. Pointers of errors begin with the edit's place in the batch: `/17/source`."""
    kind = media_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        items = _load(body, what="body")
    elif kind in NDJSON:
        lines = enumerate(body.split(b"\n"), start=1)
        items = [_load(line, what=f"line {number}") for number, line in lines if line.strip()]
    elif kind == "text/csv":
        items = _rows(body)
    else:
        raise UnsupportedMedia(f"A batch is application/json, {NDJSON[0]} or text/csv, not {kind or 'untyped'}.")
    try:
        return EDITS.validate_python(items)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found[:100]]) from None


def _load(content: bytes, *, what: str) -> Any:
    try:
        return strict_json.loads(content)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if what == "body" and error.doc else ""
        raise MalformedBody(f"The {what} is not JSON: {error.msg}{line}.") from None


def _rows(body: bytes) -> list[dict[str, Any]]:
    try:
        rows = list(read_table(io.StringIO(body.decode("utf-8-sig"), newline=""), columns=HEADER))
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body is not UTF-8 at byte {error.start}: save the table as CSV UTF-8.") from None
    except TableError as error:
        raise MalformedBody(f"The body is not a table of edits: {error}.") from None
    names = {name for _, row in rows[:1] for name in row if name}
    if rows and names != {*HEADER}:
        raise Unprocessable.at("", f"A CSV batch has the columns {','.join(HEADER)}, not {','.join(sorted(names))}.")
    cells = ([(row[name] or "").strip() for name in HEADER] for _, row in rows)
    return [{"source": source, "destination": {"prompt": prompt}} for source, prompt in cells]
