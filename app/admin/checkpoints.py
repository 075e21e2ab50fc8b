"""Checkpoints: what they are made of, how two differ, and their retraction."""

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from app.admin.access import Admin, PageRoute, Reader
from app.admin.view import ViewDep
from app.api.dependencies import PageDep, StoreDep
from app.checkpoints import aliases, difference, service
from app.checkpoints.routes import ModelName, Revision, Version
from app.evaluations import service as evaluations
from emender.schemas.checkpoints import REVISION, Retraction
from emender.schemas.common import ENDED

router = APIRouter(prefix="/models/{model}/checkpoints", route_class=PageRoute)

MAX_PICTURED = 4
"""Evaluations whose pictures are on the page of their checkpoint."""


@router.get("")
def list_checkpoints(view: ViewDep, _: Reader, model: ModelName, page: PageDep) -> Response:
    checkpoints = service.list_checkpoints(view.session, model_name=model, page=page)
    names = aliases.list_aliases(view.session, model_name=model)
    return view.render("checkpoints.html", model=model, checkpoints=checkpoints, aliases=names)


@router.get("/{revision}")
def show_checkpoint(view: ViewDep, _: Reader, model: ModelName, revision: Revision, page: PageDep) -> Response:
    found = service.read_checkpoint(view.session, model_name=model, revision=revision)
    newest = replace(page, limit=MAX_PICTURED)
    pictured = evaluations.list_evaluations(
        view.session, model_name=model, revision=found.version, kind=None, page=newest
    )
    live = found.state not in ENDED
    return view.render("checkpoint.html", live=live, model=model, checkpoint=found, pictured=pictured.items)


@router.get("/{revision}/difference")
def show_difference(
    view: ViewDep,
    store: StoreDep,
    _: Reader,
    model: ModelName,
    revision: Revision,
    against: Annotated[str, Query(pattern=REVISION)] = "base",
) -> Response:
    found = difference.compare(view.session, store=store, model_name=model, revision=revision, against=against)
    return view.render("difference.html", model=model, difference=found)


@router.get("/{version}/retract")
def show_retraction(view: ViewDep, _: Admin, model: ModelName, version: Version) -> Response:
    found = service.read_checkpoint(view.session, model_name=model, revision=version)
    return view.render("retract.html", model=model, checkpoint=found)


@router.post("/{version}/retract")
def retract(view: ViewDep, admin: Admin, model: ModelName, version: Version) -> Response:
    def act() -> str:
        reason = view.form.parse(Retraction).reason
        service.retract(view.session, model_name=model, version=version, reason=reason, actor=admin.actor)
        return f"/models/{model}/checkpoints/{version}"

    return view.submit(act, lambda: show_retraction(view, admin, model, version))
