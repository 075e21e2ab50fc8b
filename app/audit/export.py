"""The whole log, or what a filter leaves of it, as text: oldest first, read as it is written."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping

from app.audit.service import AuditFilter, all_events
from app.db.engine import Sessions
from emender.schemas.audit import AuditEventOut

Export = Callable[[Sessions, AuditFilter], Iterator[str]]


def ndjson(sessions: Sessions, wanted: AuditFilter) -> Iterator[str]:
    """A JSON object a line."""
    with sessions() as session:
        for event in all_events(session, wanted=wanted):
            yield event.model_dump_json() + "\n"


def csv_rows(sessions: Sessions, wanted: AuditFilter) -> Iterator[str]:
    """A header, then a row an event, with objects as JSON. No cell is a formula to a spreadsheet."""
    line = io.StringIO()
    writer = csv.DictWriter(line, fieldnames=list(AuditEventOut.model_fields))
    writer.writeheader()
    with sessions() as session:
        for event in all_events(session, wanted=wanted):
            row = event.model_dump(mode="json")
            writer.writerow({name: _cell(value) for name, value in row.items()})
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


FORMATS: Mapping[str, Export] = {"ndjson": ndjson, "csv": csv_rows}
