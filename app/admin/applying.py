"""Apply: which edits, what that would do, and then the doing of exactly that."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.admin.access import Applier, PageRoute
from app.admin.forms import Filled, FormDep, Reading, asked, attempt, checked, document, items, lines, word
from app.admin.rendering import page, see
from app.api.dependencies import PageDep, SessionDep, SettingsDep, StoreDep
from app.checkpoints import aliases
from app.checkpoints import apply as applying
from app.checkpoints import service as checkpoints
from app.checkpoints.errors import CheckpointNotFound
from app.checkpoints.routes import ModelName
from app.edits import service as edits
from app.problems import Conflict, Problem
from app.storage.store import Store
from emender.schemas.checkpoints import REVISION, ApplyCreate, ApplyPlan, CheckpointOut, EditInCheckpoint

router = APIRouter(route_class=PageRoute)

READY = "*"
"""Of the field `start`, whose other values are a version or an alias to start from, and empty for chosen edits."""
SHOWN = 200
"""Edits that can be checked without a filter."""
APPLY: dict[str, Reading] = {
    "/alias": word,
    "/notes": word,
    "/method": word,
    "/preset": word,
    "/alpha": word,
    "/layers": items,
    "/residual_schedule": word,
    "/moment_weight": word,
    "/contexts": word,
    "/preserve": lines,
    "/erase_scale": word,
    "/preserve_scale": word,
    "/regularization_weight": word,
}
CHANGES: dict[str, Reading] = {"/add": checked, "/remove": checked}


class Where(TypedDict):
    model_name: str
    store: Store
    folder: Path


@dataclass(frozen=True)
class Shown:
    """What a dry run shows besides its plan: the alias that is to move and the version that it is at, the version that
    is started from, and a fingerprint of all, equal where the same would be done."""

    alias: str | None
    alias_at: str | None
    start_at: str | None
    fingerprint: str


class PlanChanged(Conflict):
    title = "Plan changed"

    def __init__(self) -> None:
        super().__init__("What would be applied has changed since the dry run. This is what it is now: look again.")


@router.get("/models/{model}/apply")
def show_apply_form(
    request: Request,
    session: SessionDep,
    _: Applier,
    model: ModelName,
    listed: PageDep,
    start: Annotated[str, Query(alias="from", pattern=REVISION)] = "",
) -> Response:
    return _choose(request, session, model, listed, Filled({"start": [start]}))


@router.post("/models/{model}/apply")
def apply_edits(
    request: Request,
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: Applier,
    model: ModelName,
    listed: PageDep,
    form: FormDep,
) -> Response:
    """One form, three buttons: show other edits, the dry run, and what was shown by the dry run."""
    if form.value("do") == "show":
        return _choose(request, session, model, listed, form)
    where: Where = {"model_name": model, "store": store, "folder": settings.data_dir}
    if form.value("do") == "apply":
        applied = attempt(session, lambda: _apply(session, form, principal.actor, where))
        if isinstance(applied, CheckpointOut):
            return see(request, f"/models/{model}/checkpoints/{applied.version}")
        form = form.refused(applied)
    planned = attempt(session, lambda: _plan(session, form, where))
    if isinstance(planned, Problem):
        return _choose(request, session, model, listed, form.refused(planned))
    plan, shown = planned
    return page(
        request,
        "apply_plan.html",
        form=form,
        model=model,
        plan=plan,
        sources={edit.id: edit.source for edit in plan.edits},
        shown=shown,
    )


def _apply(session: SessionDep, form: Filled, actor: str, where: Where) -> CheckpointOut:
    """Raises `PlanChanged` where it is not what the dry run showed."""
    wanted = asked(ApplyCreate, _body(form))
    applied = applying.apply(session, request=wanted, actor=actor, **where)
    if _shown(session, where["model_name"], wanted, applied).fingerprint != form.value("seen"):
        raise PlanChanged
    return applied


def _plan(session: SessionDep, form: Filled, where: Where) -> tuple[ApplyPlan, Shown]:
    wanted = asked(ApplyCreate, _body(form))
    plan = applying.plan(session, request=wanted, **where)
    return plan, _shown(session, where["model_name"], wanted, plan)


def _shown(session: SessionDep, model: str, wanted: ApplyCreate, what: ApplyPlan | CheckpointOut) -> Shown:
    names = {alias.name: alias.version for alias in aliases.list_aliases(session, model_name=model)}
    start = checkpoints.read_checkpoint(session, model_name=model, revision=wanted.base) if wanted.base else None
    parts = what.model_dump(mode="json", include={"alpha", "layers", "statistics", "cross_attention"})
    parts["edits"] = [(str(edit.id), edit.method) for edit in what.edits]
    parts["alias"] = (wanted.alias, names.get(wanted.alias or ""))
    parts["start"] = start.version if start else None
    return Shown(
        alias=wanted.alias,
        alias_at=names.get(wanted.alias or ""),
        start_at=start.version if start else None,
        fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
    )


def _body(form: Filled) -> dict[str, Any]:
    body = document(form, APPLY)
    match form.value("start"):
        case "":
            return body | {"edits": list(form.values("/edits"))}
        case "*":
            return body | {"edits": "ready"}
        case revision:
            return body | {"from": revision} | document(form, CHANGES)


def _choose(request: Request, session: SessionDep, model: str, listed: PageDep, form: Filled) -> Response:
    """The form, with the edits that its filter shows. Those that are checked and not shown stay in it."""
    start, text = form.value("start"), form.value("text").strip()
    within: list[EditInCheckpoint] = []
    if start not in ("", READY):
        try:
            within = checkpoints.read_checkpoint(session, model_name=model, revision=start).edits
        except CheckpointNotFound as problem:
            form = form.refused(form.problem or problem)
    there = {edit.id for edit in within}
    first = replace(listed, limit=SHOWN, after=None)
    ready = edits.list_edits(session, page=first, model=model, state="ready", source_part=text or None)
    return page(
        request,
        "apply_form.html",
        form=form,
        model=model,
        ready=[edit for edit in ready.items if edit.id not in there],
        more=ready.next is not None,
        within=[edit for edit in within if text.casefold() in edit.source.casefold()][:SHOWN],
        versions=checkpoints.list_checkpoints(session, model_name=model, page=replace(listed, after=None)).items,
        aliases=aliases.list_aliases(session, model_name=model),
    )
