"""The audit log: its events and their export."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response, StreamingResponse

from app.admin.access import Admin, PageRoute
from app.admin.view import ViewDep
from app.api.dependencies import NumberedPageDep, SessionsDep
from app.audit import service
from app.audit.export import EXPORTS
from app.audit.routes import get_filter
from app.audit.service import AuditFilter

router = APIRouter(route_class=PageRoute)

FilterDep = Annotated[AuditFilter, Depends(get_filter)]


@router.get("/audit")
def list_events(view: ViewDep, _: Admin, filter: FilterDep, page: NumberedPageDep) -> Response:
    filtered = view.request.url.remove_query_params("cursor")
    return view.render(
        "audit.html",
        events=service.list_events(view.session, filter=filter, page=page),
        filter=filter,
        export_query=lambda format: filtered.include_query_params(format=format).query,
    )


@router.get("/audit/export")
def export(
    sessions: SessionsDep, _: Admin, filter: FilterDep, format: Annotated[Literal["ndjson", "csv"], Query()] = "ndjson"
) -> Response:
    """Download all events that the filter selects, oldest first."""
    media_type, write = EXPORTS[format]
    headers = {"Content-Disposition": f'attachment; filename="audit.{format}"', "Cache-Control": "no-store"}
    return StreamingResponse(write(sessions, filter), media_type=media_type, headers=headers)
