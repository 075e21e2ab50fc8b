"""Write audit events as text, oldest first, while they are read."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping

from app.audit.service import AuditFilter, stream_events
from app.db.engine import Sessions
from emender.schemas.audit import AuditEventOut


def write_ndjson(sessions: Sessions, filter: AuditFilter) -> Iterator[str]:
    """Yield one JSON object per line."""
    with sessions() as session:
        for event in stream_events(session, filter=filter):
            yield event.model_dump_json() + "\n"


def write_csv(sessions: Sessions, filter: AuditFilter) -> Iterator[str]:
    """Yield a header and one row per event, with objects as JSON. No cell is a formula in a spreadsheet."""
    line = io.StringIO()
    writer = csv.DictWriter(line, fieldnames=list(AuditEventOut.model_fields))
    writer.writeheader()
    with sessions() as session:
        for event in stream_events(session, filter=filter):
            writer.writerow({name: _cell(value) for name, value in event.model_dump(mode="json").items()})
            yield line.getvalue()
            line.seek(0)
            line.truncate()
    yield line.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


EXPORTS: Mapping[str, tuple[str, Callable[[Sessions, AuditFilter], Iterator[str]]]] = {
    "ndjson": ("application/x-ndjson", write_ndjson),
    "csv": ("text/csv", write_csv),
}
"""The media type and the writer of each format."""
