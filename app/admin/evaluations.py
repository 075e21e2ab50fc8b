"""Previews and evaluations of checkpoints: request, read and cancel them."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from starlette.responses import Response

from app.admin.access import Applier, PageRoute, Reader
from app.admin.forms import items, lines
from app.admin.view import ViewDep
from app.api.dependencies import StoreDep
from app.api.file_response import send_file
from app.checkpoints.routes import ModelName, Revision
from app.checkpoints.service import read_checkpoint
from app.evaluations import service
from app.evaluations.report import SCORES
from emender.schemas.common import ENDED
from emender.schemas.evaluations import EvaluationCreate, PreviewCreate

router = APIRouter(prefix="/models/{model}/checkpoints/{revision}/evaluations", route_class=PageRoute)

Kind = Annotated[Literal["preview", "evaluation"], Query()]


@router.get("/new")
def show_form(view: ViewDep, _: Applier, model: ModelName, revision: Revision, kind: Kind = "preview") -> Response:
    checkpoint = read_checkpoint(view.session, model_name=model, revision=revision)
    return view.render("evaluation_form.html", model=model, checkpoint=checkpoint, kind=kind)


@router.post("")
def create(view: ViewDep, applier: Applier, model: ModelName, revision: Revision, kind: Kind = "preview") -> Response:
    def act() -> str:
        arguments = {"model_name": model, "revision": revision, "actor": applier.actor}
        if kind == "preview":
            preview = view.form.parse(PreviewCreate, {"/prompts": lines, "/controls": lines, "/seeds": items})
            created = service.create_preview(view.session, request=preview, **arguments)
        else:
            evaluation = view.form.parse(EvaluationCreate, {"/held_out": lines, "/scales": items})
            created = service.create_evaluation(view.session, request=evaluation, **arguments)
        return f"/models/{model}/checkpoints/{created.version}/evaluations/{created.id}"

    return view.submit(act, lambda: show_form(view, applier, model, revision, kind))


@router.get("/{evaluation_id}")
def show_evaluation(view: ViewDep, _: Reader, model: ModelName, revision: Revision, evaluation_id: UUID) -> Response:
    found = service.read_evaluation(view.session, model_name=model, revision=revision, evaluation_id=evaluation_id)
    live = found.state not in ENDED
    return view.render("evaluation.html", live=live, model=model, evaluation=found, scores=SCORES)


@router.post("/{evaluation_id}/cancel")
def cancel(view: ViewDep, applier: Applier, model: ModelName, revision: Revision, evaluation_id: UUID) -> Response:
    def act() -> str:
        service.cancel_evaluation(
            view.session, model_name=model, revision=revision, evaluation_id=evaluation_id, actor=applier.actor
        )
        return f"/models/{model}/checkpoints/{revision}/evaluations/{evaluation_id}"

    return view.submit(act, lambda: show_evaluation(view, applier, model, revision, evaluation_id))


@router.get("/{evaluation_id}/files/{name}")
def read_file(
    view: ViewDep, store: StoreDep, _: Reader, model: ModelName, revision: Revision, evaluation_id: UUID, name: str
) -> Response:
    """Return a picture, or a report to download. It never redirects: the pages' policy allows no other host."""
    file = service.find_file(view.session, model_name=model, revision=revision, evaluation_id=evaluation_id, name=name)
    headers = {} if name.endswith(".png") else {"Content-Disposition": f'attachment; filename="{file.path}"'}
    return send_file(view.request, file, store=store, headers=headers, redirect=False)
