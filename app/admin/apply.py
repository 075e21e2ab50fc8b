"""Apply: choose edits, show what that would do, then do exactly that."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypedDict

from fastapi import APIRouter, Query
from starlette.responses import Response

from app.admin.access import Applier, PageRoute
from app.admin.forms import FormData, checked, items, lines, validate
from app.admin.view import View, ViewDep
from app.api.dependencies import PageDep, SettingsDep, StoreDep
from app.checkpoints import aliases
from app.checkpoints import apply as apply_service
from app.checkpoints import service as checkpoints
from app.checkpoints.errors import CheckpointNotFound
from app.checkpoints.routes import ModelName
from app.edits import service as edits
from app.models import service as models
from app.problems import Conflict, Problem
from app.storage.store import Store
from emender.schemas.checkpoints import REVISION, UCE_METHODS, ApplyCreate, ApplyPlan, CheckpointOut, EditInCheckpoint

router = APIRouter(route_class=PageRoute)

READY = "*"
"""A value of the field `start`. Its other values are a revision to start from, and empty for chosen edits."""
MAX_SHOWN = 200
"""Edits that the form shows at once."""
READERS = {"/layers": items, "/preserve": lines, "/edits": checked, "/add": checked, "/remove": checked}


class Arguments(TypedDict):
    model_name: str
    store: Store
    folder: Path


@dataclass(frozen=True)
class Shown:
    """What a dry run shows besides its plan."""

    alias: str | None
    alias_at: str | None
    """The version that the alias points at."""
    start_at: str | None
    """The version of the checkpoint to start from."""
    fingerprint: str
    """Equal where the same would be done."""


class PlanChanged(Conflict):
    """What would be applied is not what the dry run showed."""


@router.get("/models/{model}/apply")
def show_form(
    view: ViewDep,
    _: Applier,
    model: ModelName,
    page: PageDep,
    start: Annotated[str, Query(alias="from", pattern=REVISION)] = "",
) -> Response:
    view.form = FormData({"start": [start]})
    return _show_choice(view, model, page)


@router.post("/models/{model}/apply")
def submit(
    view: ViewDep, settings: SettingsDep, store: StoreDep, applier: Applier, model: ModelName, page: PageDep
) -> Response:
    """Handle the form's three buttons: show other edits, dry run, and apply what the dry run showed."""
    action = view.form.value("do")
    if action == "show":
        return _show_choice(view, model, page)
    arguments: Arguments = {"model_name": model, "store": store, "folder": settings.data_dir}
    if action == "apply":
        applied = view.savepoint(lambda: _apply(view, applier.actor, arguments))
        if isinstance(applied, CheckpointOut):
            return view.redirect(f"/models/{model}/checkpoints/{applied.version}")
        view.form = view.form.with_problem(applied)
    planned = view.savepoint(lambda: _plan(view, arguments))
    if isinstance(planned, Problem):
        view.form = view.form.with_problem(planned)
        return _show_choice(view, model, page)
    plan, shown = planned
    sources = {edit.id: edit.source for edit in plan.edits}
    return view.render("apply_plan.html", model=model, plan=plan, sources=sources, shown=shown)


def _apply(view: View, actor: str, arguments: Arguments) -> CheckpointOut:
    """Apply the edits. Raises `PlanChanged` if they are not what the dry run showed."""
    request = _parse_request(view.form)
    applied = apply_service.apply(view.session, request=request, actor=actor, **arguments)
    if _describe(view, arguments["model_name"], request, applied).fingerprint != view.form.value("seen"):
        raise PlanChanged("What would be applied has changed since the dry run. Review it as it is now.")
    return applied


def _plan(view: View, arguments: Arguments) -> tuple[ApplyPlan, Shown]:
    request = _parse_request(view.form)
    plan = apply_service.plan(view.session, request=request, **arguments)
    return plan, _describe(view, arguments["model_name"], request, plan)


def _describe(view: View, model: str, request: ApplyCreate, result: ApplyPlan | CheckpointOut) -> Shown:
    names = {alias.name: alias.version for alias in aliases.list_aliases(view.session, model_name=model)}
    alias_at = names.get(request.alias or "")
    start_at = None
    if request.base:
        start_at = checkpoints.read_checkpoint(view.session, model_name=model, revision=request.base).version
    parts = result.model_dump(mode="json", include={"alpha", "layers", "statistics", *UCE_METHODS})
    parts |= {"edits": [(str(edit.id), edit.method) for edit in result.edits]}
    parts |= {"alias": (request.alias, alias_at), "start": start_at}
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Shown(alias=request.alias, alias_at=alias_at, start_at=start_at, fingerprint=fingerprint)


def _parse_request(form: FormData) -> ApplyCreate:
    body = form.body(READERS)
    chosen, add, remove = (body.pop(name, []) for name in ("edits", "add", "remove"))
    match form.value("start"):
        case "":
            body["edits"] = chosen
        case "*":
            body["edits"] = "ready"
        case revision:
            body |= {"from": revision, "add": add, "remove": remove}
    return validate(ApplyCreate, body)


def _show_choice(view: View, model: str, page: PageDep) -> Response:
    """Show the form with the edits that its filter selects. Chosen edits that it hides stay in the form."""
    start, text = view.form.value("start"), view.form.value("text").strip()
    present: list[EditInCheckpoint] = []
    if start not in ("", READY):
        try:
            present = checkpoints.read_checkpoint(view.session, model_name=model, revision=start).edits
        except CheckpointNotFound as problem:
            view.form = view.form.with_problem(view.form.problem or problem)
    present_ids = {edit.id for edit in present}
    first = replace(page, limit=MAX_SHOWN, after=None)
    ready = edits.list_edits(view.session, page=first, model=model, state="ready", source_part=text or None)
    newest = checkpoints.list_checkpoints(view.session, model_name=model, page=replace(page, after=None))
    return view.render(
        "apply_form.html",
        model=model,
        methods=models.read_model(view.session, name=model).methods,
        ready=[edit for edit in ready.items if edit.id not in present_ids],
        more=ready.next is not None,
        present=[edit for edit in present if text.casefold() in edit.source.casefold()][:MAX_SHOWN],
        checkpoints=newest.items,
        aliases=aliases.list_aliases(view.session, model_name=model),
    )
