"""The audit log, found and taken away."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response, StreamingResponse

from app.admin.access import Admin, PageRoute
from app.admin.rendering import page
from app.api.dependencies import NumberedPageDep, SessionDep, SessionsDep
from app.audit import service
from app.audit.export import FORMATS
from app.audit.routes import get_filter
from app.audit.service import AuditFilter

router = APIRouter(route_class=PageRoute)

Wanted = Annotated[AuditFilter, Depends(get_filter)]
MEDIA_TYPES = {"ndjson": "application/x-ndjson", "csv": "text/csv"}


@router.get("/audit")
def list_events(request: Request, session: SessionDep, _: Admin, wanted: Wanted, listed: NumberedPageDep) -> Response:
    filtered = request.url.remove_query_params("cursor")
    return page(
        request,
        "audit.html",
        events=service.list_events(session, wanted=wanted, page=listed),
        wanted=wanted,
        export_query=lambda format: filtered.include_query_params(format=format).query,
    )


@router.get("/audit/export")
def export(
    sessions: SessionsDep,
    _: Admin,
    wanted: Wanted,
    format: Annotated[Literal["ndjson", "csv"], Query()] = "ndjson",
) -> Response:
    """All events that the filter lets through, oldest first."""
    headers = {"Content-Disposition": f'attachment; filename="audit.{format}"', "Cache-Control": "no-store"}
    return StreamingResponse(FORMATS[format](sessions, wanted), media_type=MEDIA_TYPES[format], headers=headers)
