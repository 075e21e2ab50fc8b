"""Aliases: where they pointed, and where they are to point."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from app.admin.access import Applier, PageRoute, Reader
from app.admin.forms import Filled, FormDep, Reading, asked, attempt, document, word
from app.admin.rendering import page, see
from app.api.dependencies import NumberedPageDep, PageDep, SessionDep
from app.checkpoints import aliases
from app.checkpoints.aliases import Precondition
from app.checkpoints.errors import AliasNotFound
from app.checkpoints.routes import ModelName, Revision
from app.checkpoints.service import list_checkpoints
from app.problems import Problem
from emender.schemas.checkpoints import AliasName, AliasPut
from emender.schemas.text import Text

router = APIRouter(route_class=PageRoute)

MOVE: dict[str, Reading] = {"/version": word, "/reason": word}


class Named(BaseModel):
    alias: AliasName


@router.get("/models/{model}/aliases/{alias}")
def show_alias(
    request: Request, session: SessionDep, _: Reader, model: ModelName, alias: Revision, listed: NumberedPageDep
) -> Response:
    periods = aliases.read_history(session, model_name=model, name=alias, at=None, page=listed)
    return page(request, "alias.html", model=model, alias=alias, periods=periods)


@router.get("/models/{model}/move-alias")
def show_move(
    request: Request,
    session: SessionDep,
    _: Applier,
    model: ModelName,
    listed: PageDep,
    alias: Annotated[Text, Query(max_length=200)] = "",
    version: Annotated[Text, Query(max_length=200)] = "",
) -> Response:
    """What the move would do; the form that does it bears the state of the alias that it was shown with."""
    form = Filled({"/alias": [alias], "/version": [version]})
    checked = attempt(session, lambda: _checked(form)) if alias or version else None
    if isinstance(checked, Problem):
        form = form.refused(checked)
    return _move_page(request, session, model, listed, form, asked_for=checked is not None and form.problem is None)


@router.post("/models/{model}/move-alias")
def move_alias(
    request: Request, session: SessionDep, principal: Applier, model: ModelName, listed: PageDep, form: FormDep
) -> Response:
    """By compare-and-swap. Who lost the race is shown where the alias is now, and may ask again."""

    def act() -> str:
        alias, move = _checked(form)
        seen = form.value("seen")
        aliases.move_alias(
            session,
            model_name=model,
            name=alias,
            version=move.version,
            precondition=Precondition(if_match=seen) if seen else Precondition(if_none_match="*"),
            actor=principal.actor,
            reason=move.reason,
        )
        return alias

    moved = attempt(session, act)
    if isinstance(moved, Problem):
        return _move_page(request, session, model, listed, form.refused(moved), asked_for=True)
    return see(request, f"/models/{model}/aliases/{moved}")


def _checked(form: Filled) -> tuple[str, AliasPut]:
    named = asked(Named, {"alias": form.value("/alias").strip()})
    return named.alias, asked(AliasPut, document(form, MOVE))


def _move_page(
    request: Request, session: SessionDep, model: str, listed: PageDep, form: Filled, *, asked_for: bool
) -> Response:
    try:
        now, seen = aliases.read_alias(session, model_name=model, name=form.value("/alias").strip())
    except AliasNotFound:
        now, seen = None, ""
    return page(
        request,
        "move_alias.html",
        form=form,
        model=model,
        versions=list_checkpoints(session, model_name=model, page=listed).items,
        names=[alias.name for alias in aliases.list_aliases(session, model_name=model)],
        now=now,
        seen=seen,
        asked_for=asked_for,
    )
