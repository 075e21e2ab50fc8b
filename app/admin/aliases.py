"""Aliases: their history, and moves."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.responses import Response

from app.admin.access import Applier, PageRoute, Reader
from app.admin.forms import FormData, validate
from app.admin.view import View, ViewDep
from app.api.dependencies import NumberedPageDep, PageDep
from app.checkpoints import aliases
from app.checkpoints.aliases import Precondition
from app.checkpoints.errors import AliasNotFound
from app.checkpoints.routes import ModelName, Revision
from app.checkpoints.service import list_checkpoints
from app.problems import Problem
from emender.schemas.checkpoints import AliasName, AliasPut
from emender.schemas.text import Text

router = APIRouter(route_class=PageRoute)

Field = Annotated[Text, Query(max_length=200)]


class AliasField(BaseModel):
    alias: AliasName


@router.get("/models/{model}/aliases/{alias}")
def show_alias(view: ViewDep, _: Reader, model: ModelName, alias: Revision, page: NumberedPageDep) -> Response:
    periods = aliases.read_history(view.session, model_name=model, name=alias, at=None, page=page)
    return view.render("alias.html", model=model, alias=alias, periods=periods)


@router.get("/models/{model}/move-alias")
def show_move(
    view: ViewDep, _: Applier, model: ModelName, page: PageDep, alias: Field = "", version: Field = ""
) -> Response:
    """Show what the move would do. Its form contains the ETag of the alias that it shows."""
    view.form = FormData({"/alias": [alias], "/version": [version]})
    requested = bool(alias or version)
    checked = view.savepoint(lambda: _parse_move(view.form)) if requested else None
    if isinstance(checked, Problem):
        view.form = view.form.with_problem(checked)
    return _show_move(view, model, page, confirm=requested and view.form.problem is None)


@router.post("/models/{model}/move-alias")
def move_alias(view: ViewDep, applier: Applier, model: ModelName, page: PageDep) -> Response:
    """Move the alias if it is where the form showed it; otherwise show where it is now."""

    def act() -> str:
        name, move = _parse_move(view.form)
        etag = view.form.value("seen")
        aliases.move_alias(
            view.session,
            model_name=model,
            name=name,
            version=move.version,
            precondition=Precondition(if_match=etag) if etag else Precondition(if_none_match="*"),
            actor=applier.actor,
            reason=move.reason,
        )
        return f"/models/{model}/aliases/{name}"

    return view.submit(act, lambda: _show_move(view, model, page, confirm=True))


def _parse_move(form: FormData) -> tuple[str, AliasPut]:
    body = form.body()
    return validate(AliasField, {"alias": body.pop("alias", "")}).alias, validate(AliasPut, body)


def _show_move(view: View, model: str, page: PageDep, *, confirm: bool) -> Response:
    name = view.form.value("/alias").strip()
    try:
        current, etag = aliases.read_alias(view.session, model_name=model, name=name)
    except AliasNotFound:
        current, etag = None, ""
    return view.render(
        "move_alias.html",
        model=model,
        checkpoints=list_checkpoints(view.session, model_name=model, page=page).items,
        names=[alias.name for alias in aliases.list_aliases(view.session, model_name=model)],
        current=current,
        etag=etag,
        confirm=confirm,
    )
