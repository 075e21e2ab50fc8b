"""Ask for edits, follow them, read their values."""

import hashlib
from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep, SettingsDep, StoreDep, origin_of, transaction_of
from app.api.routing import Route
from app.api.waiting import EVENTS, LastEventId, WaitDep, WatchDep
from app.auth.dependencies import EditPrincipal, ReadPrincipal
from app.edits import batch, service
from app.edits.arrivals import Arrivals
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
async def create_edit(
    request: Request, principal: EditPrincipal, model: str, edit: EditCreate, response: Response
) -> EditOut:
    """Ask for one edit. A worker finds its value; it changes nothing until it is applied."""
    state, transaction = request.app.state, transaction_of(request)
    if transaction.begun:  # under an Idempotency-Key, whose answer is kept by the transaction that does the work
        given = {"model": model, "edit": edit, "store": state.store, "folder": state.settings.data_dir}
        create = partial(service.create_edit, actor=principal.actor, **given)
        created = await run_in_threadpool(create, await transaction.session())
    else:
        arrivals: Arrivals = state.arrivals
        created = await arrivals.ask(service.Asked(model, edit, principal.actor, origin_of(request)))
    response.headers["Location"] = f"/v1/edits/{created.id}"
    return created


@router.post(
    "/models/{model}/edits/batch",
    status_code=202,
    dependencies=[Depends(read_body)],  # before the request has its transaction
    responses=documented(ModelNotFound, ModelNotReady, UnsupportedMedia, MalformedBody, ContentTooLarge),
    openapi_extra={"requestBody": batch.BODY},
)
def create_edits(
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: EditPrincipal,
    model: str,
    body: Annotated[bytes, Depends(read_body)],
    content_type: Annotated[str, Header(include_in_schema=False)] = "",
) -> EditBatchOut:
    """Ask for many edits, all or none. Errors point into the batch: `/17/templates/0`.

    Two edits of one source are taken: an apply chooses which it writes, and reports the conflict.
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


@router.get("/edits/{edit_id}", responses=documented(EditNotFound))
async def get_edit(watch: WatchDep, _: ReadPrincipal, edit_id: UUID, wait: WaitDep) -> EditOut:
    """An edit: its state, progress and values."""
    status, read = partial(service.edit_status, edit_id=edit_id), partial(service.get_edit, edit_id=edit_id)
    return await watch.settled(status, read, seconds=wait)


@router.get(
    "/edits/{edit_id}/events", response_class=StreamingResponse, responses={**EVENTS, **documented(EditNotFound)}
)
async def follow_edit(watch: WatchDep, _: ReadPrincipal, edit_id: UUID, last_event_id: LastEventId = None) -> Response:
    """Follow an edit. Each event tells its state and progress whole; `Last-Event-ID` resumes."""
    return await watch.events(partial(service.edit_status, edit_id=edit_id), known=last_event_id)


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
    """The value vectors of a ready edit."""
    content = service.value_file(session, edit_id=edit_id)
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        "Content-Disposition": f'attachment; filename="{edit_id}.safetensors"',
    }
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.post("/edits/{edit_id}/cancel", status_code=202, responses=documented(EditNotFound, EditAlreadyFinished))
def cancel_edit(session: SessionDep, principal: EditPrincipal, edit_id: UUID) -> EditOut:
    """Cancel an edit: at once while it is queued, at its next step while it is optimised."""
    return service.cancel_edit(session, edit_id=edit_id, actor=principal.actor)


@router.post("/edits/{edit_id}/retry", status_code=202, responses=documented(EditNotFound, EditNotRetryable))
def retry_edit(session: SessionDep, principal: EditPrincipal, edit_id: UUID) -> EditOut:
    """Queue a failed or cancelled edit again, as it was asked for."""
    return service.retry_edit(session, edit_id=edit_id, actor=principal.actor)
