"""Read, export and verify the audit log."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import StreamingResponse

from app.api.dependencies import NextPageLinkDep, NumberedPageDep, SessionDep, SessionsDep
from app.api.routing import Route
from app.audit import export, service
from app.audit.service import AuditFilter
from app.auth.dependencies import AdminPrincipal
from emender.schemas.audit import AuditEventOut, Verification
from emender.schemas.common import Page
from emender.schemas.text import Text
from emender.schemas.timestamps import UtcDateTime

router = APIRouter(prefix="/audit", tags=["audit"], route_class=Route)

EXPORTS = {"application/x-ndjson": export.ndjson, "text/csv": export.csv_rows}


def get_filter(
    actor: Annotated[Text | None, Query(examples=["key:1f2e3d4c5b6a", "worker"])] = None,
    action: Annotated[Text | None, Query(examples=["edit.create"])] = None,
    target: Annotated[Text | None, Query(examples=["model:emoji"])] = None,
    request_id: Annotated[Text | None, Query(description="the `X-Request-ID` of an answer")] = None,
    edit: Annotated[
        UUID | None,
        Query(description="what was done to this edit, the batch that asked for it, and what applied it"),
    ] = None,
    since: Annotated[UtcDateTime | None, Query(description="RFC 3339; without an offset it is UTC")] = None,
    until: Annotated[UtcDateTime | None, Query(description="the first moment that is left out")] = None,
) -> AuditFilter:
    return AuditFilter(
        actor=actor, action=action, target=target, request_id=request_id, edit=edit, since=since, until=until
    )


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
    session: SessionDep,
    sessions: SessionsDep,
    _: AdminPrincipal,
    wanted: Annotated[AuditFilter, Depends(get_filter)],
    page: NumberedPageDep,
    link_next: NextPageLinkDep,
    accept: Annotated[
        str, Header(description="`application/x-ndjson` or `text/csv` stream all events, oldest first")
    ] = "application/json",
) -> Response | Page[AuditEventOut]:
    """Who changed what, when and why; newest first."""
    for media_type, write in EXPORTS.items():
        if media_type in accept:
            return StreamingResponse(write(sessions, wanted), media_type=media_type)
    return link_next(service.list_events(session, wanted=wanted, page=page))


@router.get("/verify")
def verify(
    session: SessionDep,
    _: AdminPrincipal,
    head: Annotated[
        str | None, Query(pattern="^[0-9a-f]{64}$", description="a head kept from before; the log must still hold it")
    ] = None,
) -> Verification:
    """Reckon the hash of every event again; says where the chain is broken, if it is."""
    return service.verify(session, head=head)
