"""Edits: found, followed, asked for, cancelled and tried again; and their reference images."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import Response

from app.admin.access import Editor, PageRoute, Reader
from app.admin.forms import Filled, FormDep, Reading, asked, attempt, checked, document, lines, weights, word
from app.admin.plots import curve
from app.admin.rendering import NOTHING, page, see
from app.api.dependencies import NumberedPageDep, PageDep, SessionDep, SettingsDep, StoreDep
from app.audit import service as audit
from app.audit.service import AuditFilter
from app.auth.dependencies import Principal
from app.checkpoints.routes import ModelName
from app.edits import service
from app.images import service as images
from app.images.reencode import reencode_upload
from app.images.routes import ImageId
from app.models.queries import get_model
from app.problems import Problem, Unprocessable
from editing.edits import DEFAULT_TEMPLATES
from emender.schemas.common import ENDED
from emender.schemas.edits import MAX_IMAGES, EditCreate, EditOut, EditState, StageOneSettings
from emender.schemas.text import Text

router = APIRouter(route_class=PageRoute)

IMAGES = "/destination/images"
EDIT: dict[str, Reading] = {
    "/source": word,
    "/templates": lines,
    "/reason": word,
    "/settings/preset": word,
    "/settings/objective": word,
    "/settings/optimization_steps": word,
    "/settings/learning_rate": word,
    "/settings/text_weight": word,
    "/settings/guidance_scale": word,
    "/settings/layer": word,
    "/settings/seed": word,
}
DESTINATIONS: dict[str, dict[str, Reading]] = {
    "prompt": {"/destination/prompt": word},
    "images": {IMAGES: checked},
    "erase": {"/destination/neutral": word},
    "balance": {"/destination/balance": weights},
}
NOTHING_GIVEN = {"prompt": "", "images": [], "erase": True, "balance": {}}
"""What each kind of destination is without its field: refused where the field is needed."""


@router.get("/models/{model}/edits")
def list_edits(
    request: Request,
    session: SessionDep,
    _: Reader,
    model: ModelName,
    listed: PageDep,
    state: EditState | None = None,
    text: Annotated[Text | None, Query(max_length=500)] = None,
) -> Response:
    get_model(session, name=model)
    found = service.list_edits(session, page=listed, model=model, state=state, source_part=text)
    return page(request, "edits.html", model=model, edits=found, state=state, text=text)


@router.get("/models/{model}/edits/new")
def show_edit_form(request: Request, session: SessionDep, _: Editor, model: ModelName) -> Response:
    get_model(session, name=model)
    return _edit_form(request, model, NOTHING)


@router.post("/models/{model}/edits")
async def post_edit(
    request: Request,
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: Editor,
    model: ModelName,
    form: FormDep,
) -> Response:
    """Images that were uploaded stay, and stay in the form, whatever becomes of the edit."""
    kept, fault = list(form.values(IMAGES)), None
    files = [file for file in (await request.form()).getlist("files") if isinstance(file, UploadFile) and file.filename]
    if len(kept) + len(files) > MAX_IMAGES:
        files, fault = [], Unprocessable.at(IMAGES, f"An edit takes at most {MAX_IMAGES} images.")
    for file in files:
        try:
            picture = await reencode_upload(file.file, settings=settings, decoders=request.app.state.decoders)
            image = await run_in_threadpool(
                images.add_image, session, picture=picture, store=store, actor=principal.actor
            )
            kept.append(image.id)
        except Problem as problem:
            fault = Unprocessable.at(IMAGES, f"{file.filename}: {problem.detail}")
    form = replace(form, fields={**form.fields, IMAGES: list(dict.fromkeys(kept))})

    def create() -> EditOut:
        if fault is not None:
            raise fault
        edit = asked(EditCreate, _body(form))
        return service.create_edit(
            session, model=model, edit=edit, store=store, folder=settings.data_dir, actor=principal.actor
        )

    created = await run_in_threadpool(attempt, session, create)
    if isinstance(created, Problem):
        return _edit_form(request, model, form.refused(created))
    return see(request, f"/edits/{created.id}")


def _body(form: Filled) -> dict[str, object]:
    """With the destination of the kind that was chosen alone."""
    kind = form.value("kind")
    body = document(form, EDIT | DESTINATIONS.get(kind, {}))
    given = body.get("destination", {})
    return {**body, "destination": {kind: NOTHING_GIVEN[kind], **given} if kind in NOTHING_GIVEN else given}


def _edit_form(request: Request, model: str, form: Filled) -> Response:
    return page(
        request, "edit_form.html", form=form, model=model, defaults=StageOneSettings(), templates=DEFAULT_TEMPLATES
    )


@router.get("/edits/{edit_id}")
def show_edit(
    request: Request, session: SessionDep, principal: Reader, edit_id: UUID, listed: NumberedPageDep
) -> Response:
    return _edit_page(request, session, principal, edit_id, listed)


@router.post("/edits/{edit_id}/cancel")
def cancel_edit(
    request: Request, session: SessionDep, principal: Editor, edit_id: UUID, listed: NumberedPageDep
) -> Response:
    return _acted(request, session, principal, edit_id, listed, service.cancel_edit)


@router.post("/edits/{edit_id}/retry")
def retry_edit(
    request: Request, session: SessionDep, principal: Editor, edit_id: UUID, listed: NumberedPageDep
) -> Response:
    return _acted(request, session, principal, edit_id, listed, service.retry_edit)


def _acted(
    request: Request,
    session: SessionDep,
    principal: Principal,
    edit_id: UUID,
    listed: NumberedPageDep,
    act: Callable[..., EditOut],
) -> Response:
    done = attempt(session, lambda: act(session, edit_id=edit_id, actor=principal.actor))
    if isinstance(done, Problem):
        return _edit_page(request, session, principal, edit_id, listed, form=NOTHING.refused(done))
    return see(request, f"/edits/{edit_id}")


def _edit_page(
    request: Request,
    session: SessionDep,
    principal: Principal,
    edit_id: UUID,
    listed: NumberedPageDep,
    *,
    form: Filled = NOTHING,
) -> Response:
    edit = service.get_edit(session, edit_id=edit_id)
    losses = service.losses(session, edit_id=edit_id)
    curves = [drawn for drawn in (curve("Text loss", losses.text), curve("Noise loss", losses.noise)) if drawn]
    events = []
    if principal.may("admin"):
        events = audit.list_events(session, wanted=AuditFilter(edit=edit_id), page=listed).items
    under_way = edit.state not in ENDED
    return page(
        request,
        "edit.html",
        form=form,
        live=under_way,
        under_way=under_way,
        edit=edit,
        model=edit.model,
        curves=curves,
        events=events,
    )


@router.get("/images/{image_id}")
def read_image(session: SessionDep, store: StoreDep, _: Reader, image_id: ImageId) -> Response:
    content = images.read_image(session, image_id=image_id, store=store)
    return Response(content, media_type="image/png", headers={"Cache-Control": "no-store"})
