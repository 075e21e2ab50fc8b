"""Create, list, follow, cancel and retry edits, and read their values."""

import hashlib
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep, SettingsDep, StoreDep
from app.api.routing import Route, accept_large_body
from app.api.work_routes import work_routes
from app.auth.dependencies import EditPrincipal, ReadPrincipal
from app.edits import batch, service
from app.edits.errors import EditAlreadyFinished, EditNotFound, EditNotReady, EditNotRetryable
from app.models.errors import ModelNotFound, ModelNotReady
from app.problems import ContentTooLarge, MalformedBody, UnsupportedMedia, documented
from emender.schemas.common import Page
from emender.schemas.edits import EditBatchOut, EditCreate, EditOut, EditState, Source
from emender.schemas.text import Text

router = APIRouter(tags=["edits"], route_class=Route)


async def read_body(request: Request) -> bytes:
    return await request.body()


@router.post("/models/{model}/edits", status_code=202, responses=documented(ModelNotFound, ModelNotReady))
def create_edit(
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: EditPrincipal,
    model: str,
    edit: EditCreate,
    response: Response,
) -> EditOut:
    """Create an edit. A worker computes its value; the model changes only when the edit is applied."""
    created = service.create_edit(
        session, model=model, edit=edit, store=store, folder=settings.data_dir, actor=principal.actor
    )
    response.headers["Location"] = f"/v1/edits/{created.id}"
    return created


@router.post(
    "/models/{model}/edits/batch",
    status_code=202,
    responses=documented(ModelNotFound, ModelNotReady, UnsupportedMedia, MalformedBody, ContentTooLarge),
    openapi_extra={"requestBody": batch.BODY},
)
@accept_large_body
def create_edits(
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: EditPrincipal,
    model: str,
    body: Annotated[bytes, Depends(read_body)],
    content_type: Annotated[str, Header(include_in_schema=False)] = "",
) -> EditBatchOut:
    """Create many edits, all or none. Errors point into the batch: `/17/templates/0`.

    Edits may have the same source: an apply chooses which of them it writes, and reports conflicts.
    """
    return service.create_edits(
        session,
        model=model,
        edits=batch.parse(body, media_type=content_type),
        store=store,
        folder=settings.data_dir,
        actor=principal.actor,
    )


@router.get("/edits")
def list_edits(
    session: SessionDep,
    _: ReadPrincipal,
    page: PageDep,
    link_next: NextPageLinkDep,
    model: Annotated[Text | None, Query(description="a model's name")] = None,
    state: Annotated[EditState | None, Query()] = None,
    source: Annotated[Source | None, Query(description="exactly this source")] = None,
    created_by: Annotated[Text | None, Query(examples=["key:1f2e3d4c5b6a"])] = None,
) -> Page[EditOut]:
    """List edits, newest first."""
    return link_next(
        service.list_edits(session, page=page, model=model, state=state, source=source, created_by=created_by)
    )


@work_routes(router, "/edits/{edit_id}", EditNotFound, find=service.find_edit, follow="follow_edit")
def get_edit(session: SessionDep, edit_id: UUID) -> EditOut:
    """Return an edit with its state, progress and values."""
    return service.get_edit(session, edit_id=edit_id)


@router.get(
    "/edits/{edit_id}/value",
    response_class=Response,
    responses={
        200: {
            "description": "safetensors: `<encoder>.delta` and `<encoder>.hidden`, float32",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        **documented(EditNotFound, EditNotReady),
    },
)
def get_value(session: SessionDep, _: ReadPrincipal, edit_id: UUID) -> Response:
    """Download the value of a ready edit."""
    content = service.value_file(session, edit_id=edit_id)
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        "Content-Disposition": f'attachment; filename="{edit_id}.safetensors"',
    }
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.post("/edits/{edit_id}/cancel", status_code=202, responses=documented(EditNotFound, EditAlreadyFinished))
def cancel_edit(session: SessionDep, principal: EditPrincipal, edit_id: UUID) -> EditOut:
    """Cancel a queued edit at once, or a running one at its next step."""
    return service.cancel_edit(session, edit_id=edit_id, actor=principal.actor)


@router.post("/edits/{edit_id}/retry", status_code=202, responses=documented(EditNotFound, EditNotRetryable))
def retry_edit(session: SessionDep, principal: EditPrincipal, edit_id: UUID) -> EditOut:
    """Queue a failed or cancelled edit again, unchanged."""
    return service.retry_edit(session, edit_id=edit_id, actor=principal.actor)
