"""Read, export and verify the audit log."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import StreamingResponse

from app.api.dependencies import NextPageLinkDep, NumberedPageDep, SessionDep, SessionsDep
from app.api.routing import Route
from app.audit import service
from app.audit.export import EXPORTS
from app.audit.service import AuditFilter
from app.auth.dependencies import AdminPrincipal
from emender.schemas.audit import AuditEventOut, Verification
from emender.schemas.common import Page
from emender.schemas.text import Text
from emender.schemas.timestamps import UtcDateTime

router = APIRouter(prefix="/audit", tags=["audit"], route_class=Route)


def get_filter(
    actor: Annotated[Text | None, Query(examples=["key:1f2e3d4c5b6a", "worker"])] = None,
    action: Annotated[Text | None, Query(examples=["edit.create"])] = None,
    target: Annotated[Text | None, Query(examples=["model:emoji"])] = None,
    request_id: Annotated[Text | None, Query(description="the `X-Request-ID` of a response")] = None,
    edit: Annotated[
        UUID | None,
        Query(description="events of this edit, of the batch that created it, and of the checkpoints that contain it"),
    ] = None,
    since: Annotated[UtcDateTime | None, Query(description="RFC 3339, inclusive; UTC if it has no offset")] = None,
    until: Annotated[UtcDateTime | None, Query(description="RFC 3339, exclusive")] = None,
) -> AuditFilter:
    return AuditFilter(
        actor=actor, action=action, target=target, request_id=request_id, edit=edit, since=since, until=until
    )


@router.get(
    "",
    response_model=Page[AuditEventOut],
    responses={200: {"content": {media_type: {"schema": {"type": "string"}} for media_type, _ in EXPORTS.values()}}},
)
def list_events(
    session: SessionDep,
    sessions: SessionsDep,
    _: AdminPrincipal,
    filter: Annotated[AuditFilter, Depends(get_filter)],
    page: NumberedPageDep,
    link_next: NextPageLinkDep,
    accept: Annotated[
        str, Header(description="`application/x-ndjson` or `text/csv` stream all events, oldest first")
    ] = "application/json",
) -> Response | Page[AuditEventOut]:
    """List who changed what, when and why, newest first."""
    for media_type, write in EXPORTS.values():
        if media_type in accept:
            return StreamingResponse(write(sessions, filter), media_type=media_type)
    return link_next(service.list_events(session, filter=filter, page=page))


@router.get("/verify")
def verify(
    session: SessionDep,
    _: AdminPrincipal,
    head: Annotated[
        str | None,
        Query(
            pattern="^[0-9a-f]{64}$", description="the head of an earlier verification; the log must still contain it"
        ),
    ] = None,
) -> Verification:
    """Compute the hash of every event again. Names the first event that does not match."""
    return service.verify(session, head=head)
