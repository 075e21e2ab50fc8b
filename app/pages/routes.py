"""The pages: what the calls of the same scope give, for people."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Form, Query, Request
from starlette.responses import RedirectResponse, Response

from app.audit import service as audit
from app.audit.routes import get_filter
from app.audit.service import AuditFilter
from app.auth import browser_sessions
from app.auth.dependencies import Principal, find_key
from app.checkpoints import aliases
from app.checkpoints import service as checkpoints
from app.checkpoints.delivery import deliver
from app.checkpoints.difference import difference
from app.checkpoints.routes import ModelName, Revision
from app.checkpoints.schemas import REVISION
from app.dependencies import NumberedPageDep, PageDep, SessionDep, StoreDep
from app.edits import service as edits
from app.edits.schemas import EditState
from app.evaluations import service as evaluations
from app.evaluations.report import SCORES
from app.models import service as models
from app.pages import access
from app.pages.plots import curve
from app.pages.rendering import page
from app.problems import Forbidden, NotFound, Unauthorized
from app.queueing import jobs
from app.rate_limits import RateLimitsDep, TooManyRequests
from app.text import Text

FAILURES = 10

router = APIRouter()

Reader = Annotated[Principal, Depends(access.requires("read"))]
Auditor = Annotated[Principal, Depends(access.requires("admin"))]
Wanted = Annotated[str, Query(max_length=2_000, description="the page that was asked for, below the root")]


@router.get("/sign-in")
def show_sign_in(request: Request, to: Wanted = "") -> Response:
    token = access.visitor(request)
    response = page(request, "sign_in.html", token=token, to=to, error=None)
    access.set_cookie(request, response, token)
    return response


@router.post("/sign-in", dependencies=[Depends(access.check_form)])
def sign_in(
    request: Request,
    session: SessionDep,
    limits: RateLimitsDep,
    key: Annotated[str, Form(max_length=200)] = "",
    to: Annotated[str, Form(max_length=2_000)] = "",
) -> Response:
    """Begin a session under a new token. Wrong keys count against their address, as in the API."""
    try:
        found = find_key(request, session, limits, token=key.strip())
        Principal.of(found).require("read")
    except (Unauthorized, Forbidden, TooManyRequests) as error:
        return page(request, "sign_in.html", status=error.status, headers=error.headers, to=to, error=error.detail)
    response = RedirectResponse(f"{request.scope['root_path']}/{to.lstrip('/')}", status_code=303)
    access.set_cookie(request, response, browser_sessions.begin(session, key_id=found.id))
    return response


@router.post("/sign-out", dependencies=[Depends(access.check_form)])
def sign_out(request: Request, session: SessionDep) -> Response:
    browser_sessions.end(session, token=request.cookies[access.COOKIE])
    root = request.scope["root_path"]
    response = RedirectResponse(f"{root}/sign-in", status_code=303)
    response.delete_cookie(access.COOKIE, path=root)
    return response


@router.get("/")
def show_overview(request: Request, session: SessionDep, _: Reader, listed: PageDep) -> Response:
    queue = jobs.queue(session, failures=FAILURES)
    failed = [job.target_id for job in queue.failed if job.kind == "build_checkpoint"]
    return page(
        request,
        "overview.html",
        queue=queue,
        failed_versions=checkpoints.versions_by_id(session, ids=failed),
        models=models.list_models(session, page=listed),
        versions=checkpoints.newest_versions(session),
    )


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
    checkpoints.find_model(session, name=model)
    found = edits.list_edits(session, page=listed, model=model, state=state, source_part=text)
    return page(request, "edits.html", model=model, edits=found, state=state, text=text)


@router.get("/edits/{edit_id}")
def show_edit(
    request: Request, session: SessionDep, principal: Reader, edit_id: UUID, listed: NumberedPageDep
) -> Response:
    edit = edits.get_edit(session, edit_id=edit_id)
    curves = [
        (encoder, drawn)
        for encoder, losses in edits.losses(session, edit_id=edit_id).items()
        for drawn in (curve("Text loss", losses.text), curve("Noise loss", losses.noise))
        if drawn is not None
    ]
    events = []
    if "admin" in principal.scopes:
        events = audit.list_events(session, wanted=AuditFilter(edit=edit_id), page=listed).items
    return page(request, "edit.html", edit=edit, model=edit.model, curves=curves, events=events)


@router.get("/models/{model}/checkpoints")
def list_checkpoints(request: Request, session: SessionDep, _: Reader, model: ModelName, listed: PageDep) -> Response:
    found = checkpoints.list_checkpoints(session, model_name=model, page=listed)
    pointing = aliases.list_aliases(session, model=checkpoints.find_model(session, name=model))
    return page(request, "checkpoints.html", model=model, checkpoints=found, aliases=pointing)


@router.get("/models/{model}/checkpoints/{revision}")
def show_checkpoint(request: Request, session: SessionDep, _: Reader, model: ModelName, revision: Revision) -> Response:
    found = checkpoints.read_checkpoint(session, model_name=model, revision=revision)
    return page(request, "checkpoint.html", model=model, checkpoint=found)


@router.get("/models/{model}/checkpoints/{revision}/difference")
def show_difference(
    request: Request,
    session: SessionDep,
    store: StoreDep,
    _: Reader,
    model: ModelName,
    revision: Revision,
    against: Annotated[str, Query(pattern=REVISION)] = "base",
) -> Response:
    found = difference(session, store=store, model_name=model, revision=revision, against=against)
    return page(request, "difference.html", model=model, difference=found)


EVALUATION = "/models/{model}/checkpoints/{revision}/evaluations/{evaluation_id}"


@router.get(EVALUATION)
def show_evaluation(
    request: Request, session: SessionDep, _: Reader, model: ModelName, revision: Revision, evaluation_id: UUID
) -> Response:
    found = evaluations.read_evaluation(session, model_name=model, version=revision, evaluation_id=evaluation_id)
    return page(request, "evaluation.html", model=model, evaluation=found, scores=SCORES)


@router.get(EVALUATION + "/files/{name}")
def read_file(
    request: Request,
    session: SessionDep,
    store: StoreDep,
    _: Reader,
    model: ModelName,
    revision: Revision,
    evaluation_id: UUID,
    name: str,
) -> Response:
    """A picture, or a report to be kept. Never a bucket's: the pages' policy lets no other host in."""
    file = evaluations.find_file(session, model_name=model, version=revision, evaluation_id=evaluation_id, name=name)
    headers = {} if name.endswith(".png") else {"Content-Disposition": f'attachment; filename="{file.path}"'}
    return deliver(request, file, store=store, headers=headers, redirect=False)


@router.get("/audit")
def list_events(
    request: Request,
    session: SessionDep,
    _: Auditor,
    wanted: Annotated[AuditFilter, Depends(get_filter)],
    listed: NumberedPageDep,
) -> Response:
    return page(request, "audit.html", events=audit.list_events(session, wanted=wanted, page=listed), wanted=wanted)


@router.get("/{path:path}")
def nothing(_: Reader) -> Response:
    raise NotFound("There is no page at this address; the overview leads to all that there are.")
