"""Edits and their reference images: list, read, create, cancel and retry them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import Response

from app.admin.access import Editor, PageRoute, Reader
from app.admin.forms import FormData, checked, lines, validate, weights
from app.admin.plots import curve
from app.admin.view import View, ViewDep
from app.api.dependencies import NumberedPageDep, PageDep, SettingsDep, StoreDep
from app.api.routing import accept_large_body
from app.audit import service as audit
from app.audit.service import AuditFilter
from app.auth.service import Principal
from app.checkpoints.routes import ModelName
from app.edits import service
from app.images import service as images
from app.images.reencode import Picture, reencode_upload
from app.images.routes import ImageId
from app.models.queries import get_model
from app.problems import Problem, Unprocessable
from editing.edits import DEFAULT_TEMPLATES
from emender.schemas.common import ENDED
from emender.schemas.edits import MAX_IMAGES, EditCreate, EditOut, EditState, StageOneSettings
from emender.schemas.text import Text

router = APIRouter(route_class=PageRoute)

IMAGES = "/destination/images"
EMPTY_DESTINATIONS: dict[str, object] = {"prompt": "", "images": [], "erase": True, "balance": {}}
"""Each kind of destination with its field left empty. The schema refuses those that need it."""


@router.get("/models/{model}/edits")
def list_edits(
    view: ViewDep,
    _: Reader,
    model: ModelName,
    page: PageDep,
    state: EditState | None = None,
    text: Annotated[Text | None, Query(max_length=500)] = None,
) -> Response:
    get_model(view.session, name=model)
    found = service.list_edits(view.session, page=page, model=model, state=state, source_part=text)
    return view.render("edits.html", model=model, edits=found, state=state, text=text)


@router.get("/models/{model}/edits/new")
def show_form(view: ViewDep, _: Editor, model: ModelName) -> Response:
    get_model(view.session, name=model)
    return view.render("edit_form.html", model=model, defaults=StageOneSettings(), templates=DEFAULT_TEMPLATES)


Upload = tuple[str, Picture | Problem]
"""The name of an uploaded image, and the image or what is wrong with it."""


async def reencode_files(request: Request, _: Editor) -> list[Upload]:
    state, uploads = request.app.state, list[Upload]()
    for file in (await request.form()).getlist("files")[: MAX_IMAGES + 1]:
        if isinstance(file, UploadFile) and file.filename:
            try:
                picture = await reencode_upload(file.file, settings=state.settings, decoders=state.decoders)
                uploads.append((file.filename, picture))
            except Problem as problem:
                uploads.append((file.filename, problem))
    return uploads


@router.post("/models/{model}/edits")
@accept_large_body
def create_edit(
    view: ViewDep,
    settings: SettingsDep,
    store: StoreDep,
    editor: Editor,
    model: ModelName,
    uploads: Annotated[list[Upload], Depends(reencode_files)],
) -> Response:
    """Create an edit. Uploaded images are kept, and stay in the form, also if the edit is refused."""
    image_ids, problem = list(view.form.values(IMAGES)), None
    if len(image_ids) + len(uploads) > MAX_IMAGES:
        uploads, problem = [], Unprocessable.at(IMAGES, f"An edit takes at most {MAX_IMAGES} images.")
    for name, picture in uploads:
        if isinstance(picture, Problem):
            problem = Unprocessable.at(IMAGES, f"{name}: {picture.detail}")
        else:
            image = images.add_image(view.session, picture=picture, store=store, actor=editor.actor)
            image_ids.append(image.id)
    view.form = replace(view.form, fields={**view.form.fields, IMAGES: list(dict.fromkeys(image_ids))})

    def act() -> str:
        if problem is not None:
            raise problem
        edit = _parse_edit(view.form)
        created = service.create_edit(
            view.session, model=model, edit=edit, store=store, folder=settings.data_dir, actor=editor.actor
        )
        return f"/edits/{created.id}"

    return view.submit(act, lambda: show_form(view, editor, model))


def _parse_edit(form: FormData) -> EditCreate:
    """Parse the edit, with only the destination of the kind that was chosen."""
    kind = form.value("kind")
    names = {"erase": "neutral"}
    others = {f"/destination/{names.get(other, other)}" for other in EMPTY_DESTINATIONS if other != kind}
    form = replace(form, fields={name: values for name, values in form.fields.items() if name not in others})
    body = form.body({"/templates": lines, IMAGES: checked, "/destination/balance": weights})
    if kind in EMPTY_DESTINATIONS:
        body["destination"] = {kind: EMPTY_DESTINATIONS[kind], **body.get("destination", {})}
    return validate(EditCreate, body)


@router.get("/edits/{edit_id}")
def show_edit(view: ViewDep, reader: Reader, edit_id: UUID, page: NumberedPageDep) -> Response:
    edit = service.get_edit(view.session, edit_id=edit_id)
    losses = service.losses(view.session, edit_id=edit_id)
    curves = [drawn for drawn in (curve("Text loss", losses.text), curve("Noise loss", losses.noise)) if drawn]
    events = []
    if reader.may("admin"):
        events = audit.list_events(view.session, filter=AuditFilter(edit=edit_id), page=page).items
    live = edit.state not in ENDED
    return view.render("edit.html", live=live, edit=edit, model=edit.model, curves=curves, events=events)


@router.post("/edits/{edit_id}/cancel")
def cancel_edit(view: ViewDep, editor: Editor, edit_id: UUID, page: NumberedPageDep) -> Response:
    return _submit(view, editor, edit_id, page, service.cancel_edit)


@router.post("/edits/{edit_id}/retry")
def retry_edit(view: ViewDep, editor: Editor, edit_id: UUID, page: NumberedPageDep) -> Response:
    return _submit(view, editor, edit_id, page, service.retry_edit)


def _submit(
    view: View, editor: Principal, edit_id: UUID, page: NumberedPageDep, act: Callable[..., EditOut]
) -> Response:
    return view.submit(
        lambda: f"/edits/{act(view.session, edit_id=edit_id, actor=editor.actor).id}",
        lambda: show_edit(view, editor, edit_id, page),
    )


@router.get("/images/{image_id}")
def read_image(view: ViewDep, store: StoreDep, _: Reader, image_id: ImageId) -> Response:
    content = images.read_image(view.session, image_id=image_id, store=store)
    return Response(content, media_type="image/png", headers={"Cache-Control": "no-store"})
