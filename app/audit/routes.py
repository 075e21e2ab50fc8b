"""Read, export and verify the audit log."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.audit import service
from app.audit.schemas import AuditEventOut, Verification
from app.audit.service import AuditFilter
from app.auth.dependencies import AdminPrincipal
from app.db.engine import Sessions
from app.dependencies import Page, SessionDep, SessionsDep
from app.routing import Route
from app.text import Text

router = APIRouter(prefix="/audit", tags=["audit"], route_class=Route)


def get_filter(
    actor: Annotated[Text | None, Query(examples=["key:1f2e3d4c5b6a", "worker"])] = None,
    action: Annotated[Text | None, Query(examples=["edit.create"])] = None,
    target: Annotated[Text | None, Query(examples=["model:emoji"])] = None,
    since: Annotated[datetime | None, Query(description="RFC 3339; without an offset it is UTC")] = None,
) -> AuditFilter:
    return AuditFilter(actor=actor, action=action, target=target, since=since)


@router.get(
    "",
    response_model=Page[AuditEventOut],
    responses={
        200: {
            "content": {
                "application/x-ndjson": {"schema": {"type": "string"}},
                "text/csv": {"schema": {"type": "string"}},
            }
        }
    },
)
def list_events(
    request: Request,
    response: Response,
    session: SessionDep,
    sessions: SessionsDep,
    _: AdminPrincipal,
    wanted: Annotated[AuditFilter, Depends(get_filter)],
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[int | None, Query(ge=1, description="`next` of the page before")] = None,
    accept: Annotated[
        str, Header(description="`application/x-ndjson` or `text/csv` stream all events, oldest first")
    ] = "application/json",
) -> Response | Page[AuditEventOut]:
    """Who changed what, when and why; newest first."""
    for media_type, write in EXPORTS.items():
        if media_type in accept:
            return StreamingResponse(write(sessions, wanted), media_type=media_type)
    events = service.list_events(session, wanted=wanted, before=cursor, limit=limit + 1)
    if len(events) <= limit:
        return Page(items=events, next=None)
    following = str(events[limit - 1].sequence)
    response.headers["Link"] = f'<{request.url.include_query_params(cursor=following)}>; rel="next"'
    return Page(items=events[:limit], next=following)


@router.get("/verify")
def verify(session: SessionDep, _: AdminPrincipal) -> Verification:
    """Reckon the hash of every event again; says where the chain is broken, if it is."""
    return service.verify(session)


def _ndjson(sessions: Sessions, wanted: AuditFilter) -> Iterator[str]:
    with sessions() as session:
        for event in service.all_events(session, wanted=wanted):
            yield event.model_dump_json() + "\n"


def _csv(sessions: Sessions, wanted: AuditFilter) -> Iterator[str]:
    line = io.StringIO()
    writer = csv.DictWriter(line, fieldnames=list(AuditEventOut.model_fields))
    writer.writeheader()
    with sessions() as session:
        for event in service.all_events(session, wanted=wanted):
            writer.writerow(event.model_dump(mode="json") | {"details": json.dumps(event.details, sort_keys=True)})
            yield line.getvalue()
            line.seek(0)
            line.truncate()
    yield line.getvalue()


EXPORTS: dict[str, Callable[[Sessions, AuditFilter], Iterator[str]]] = {
    "application/x-ndjson": _ndjson,
    "text/csv": _csv,
}
