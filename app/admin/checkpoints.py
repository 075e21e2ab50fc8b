"""Versions: what they are made of, what differs between two, their pictures and figures, and how one is retracted."""

from dataclasses import replace
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.admin.access import Admin, Applier, PageRoute, Reader
from app.admin.forms import Filled, FormDep, Reading, asked, attempt, document, items, lines, word
from app.admin.rendering import NOTHING, page, see
from app.api.dependencies import PageDep, SessionDep, StoreDep
from app.api.file_response import send_file
from app.checkpoints import aliases, difference, service
from app.checkpoints.routes import ModelName, Revision, Version
from app.evaluations import service as evaluations
from app.evaluations.report import SCORES
from app.problems import Problem
from emender.schemas.checkpoints import REVISION, Retraction
from emender.schemas.common import ENDED
from emender.schemas.evaluations import EvaluationCreate, PreviewCreate

router = APIRouter(route_class=PageRoute)

VERSIONS = "/models/{model}/checkpoints"
VERSION = VERSIONS + "/{version}"
PICTURED = 4
"""Evaluations whose pictures are shown on a version's own page."""

Kind = Annotated[Literal["preview", "evaluation"], Query()]
PREVIEW: dict[str, Reading] = {
    "/prompts": lines,
    "/controls": lines,
    "/seeds": items,
    "/num_inference_steps": word,
    "/guidance_scale": word,
}
EVALUATION: dict[str, Reading] = {
    "/held_out": lines,
    "/scales": items,
    "/seed": word,
    "/num_inference_steps": word,
    "/guidance_scale": word,
}


@router.get(VERSIONS)
def list_checkpoints(request: Request, session: SessionDep, _: Reader, model: ModelName, listed: PageDep) -> Response:
    found = service.list_checkpoints(session, model_name=model, page=listed)
    pointing = aliases.list_aliases(session, model_name=model)
    return page(request, "checkpoints.html", model=model, checkpoints=found, aliases=pointing)


@router.get(VERSIONS + "/{revision}")
def show_checkpoint(
    request: Request, session: SessionDep, _: Reader, model: ModelName, revision: Revision, listed: PageDep
) -> Response:
    found = service.read_checkpoint(session, model_name=model, revision=revision)
    newest = replace(listed, limit=PICTURED)
    drawn = evaluations.list_evaluations(session, model_name=model, revision=found.version, kind=None, page=newest)
    return page(
        request,
        "checkpoint.html",
        live=found.state not in ENDED,
        model=model,
        checkpoint=found,
        drawn=drawn.items,
    )


@router.get(VERSIONS + "/{revision}/difference")
def show_difference(
    request: Request,
    session: SessionDep,
    store: StoreDep,
    _: Reader,
    model: ModelName,
    revision: Revision,
    against: Annotated[str, Query(pattern=REVISION)] = "base",
) -> Response:
    found = difference.compare(session, store=store, model_name=model, revision=revision, against=against)
    return page(request, "difference.html", model=model, difference=found)


@router.get(VERSION + "/retract")
def show_retraction(request: Request, session: SessionDep, _: Admin, model: ModelName, version: Version) -> Response:
    return _retraction(request, session, model, version, NOTHING)


@router.post(VERSION + "/retract")
def retract(
    request: Request, session: SessionDep, principal: Admin, model: ModelName, version: Version, form: FormDep
) -> Response:
    def act() -> object:
        reason = asked(Retraction, {"reason": form.value("/reason").strip()}).reason
        return service.retract(session, model_name=model, version=version, reason=reason, actor=principal.actor)

    done = attempt(session, act)
    if isinstance(done, Problem):
        return _retraction(request, session, model, version, form.refused(done))
    return see(request, f"/models/{model}/checkpoints/{version}")


def _retraction(request: Request, session: SessionDep, model: str, version: str, form: Filled) -> Response:
    found = service.read_checkpoint(session, model_name=model, revision=version)
    return page(request, "retract.html", form=form, model=model, checkpoint=found)


@router.get(VERSION + "/evaluations/new")
def show_evaluation_form(
    request: Request, session: SessionDep, _: Applier, model: ModelName, version: Version, kind: Kind = "preview"
) -> Response:
    return _evaluation_form(request, session, model, version, kind, NOTHING)


@router.post(VERSION + "/evaluations")
def ask_for_evaluation(
    request: Request,
    session: SessionDep,
    principal: Applier,
    model: ModelName,
    version: Version,
    form: FormDep,
    kind: Kind = "preview",
) -> Response:
    where = {"model_name": model, "revision": version, "actor": principal.actor}
    if kind == "preview":
        created = attempt(
            session,
            lambda: evaluations.create_preview(session, request=asked(PreviewCreate, document(form, PREVIEW)), **where),
        )
    else:
        created = attempt(
            session,
            lambda: evaluations.create_evaluation(
                session, request=asked(EvaluationCreate, document(form, EVALUATION)), **where
            ),
        )
    if isinstance(created, Problem):
        return _evaluation_form(request, session, model, version, kind, form.refused(created))
    return see(request, f"/models/{model}/checkpoints/{version}/evaluations/{created.id}")


def _evaluation_form(
    request: Request, session: SessionDep, model: str, version: str, kind: str, form: Filled
) -> Response:
    found = service.read_checkpoint(session, model_name=model, revision=version)
    return page(request, "evaluation_form.html", form=form, model=model, checkpoint=found, kind=kind)


EVALUATED = VERSIONS + "/{revision}/evaluations/{evaluation_id}"


@router.get(EVALUATED)
def show_evaluation(
    request: Request, session: SessionDep, _: Reader, model: ModelName, revision: Revision, evaluation_id: UUID
) -> Response:
    return _evaluation_page(request, session, model, revision, evaluation_id)


@router.post(EVALUATED + "/cancel")
def cancel_evaluation(
    request: Request,
    session: SessionDep,
    principal: Applier,
    model: ModelName,
    revision: Revision,
    evaluation_id: UUID,
) -> Response:
    done = attempt(
        session,
        lambda: evaluations.cancel_evaluation(
            session, model_name=model, revision=revision, evaluation_id=evaluation_id, actor=principal.actor
        ),
    )
    if isinstance(done, Problem):
        return _evaluation_page(request, session, model, revision, evaluation_id, form=NOTHING.refused(done))
    return see(request, f"/models/{model}/checkpoints/{revision}/evaluations/{evaluation_id}")


def _evaluation_page(
    request: Request, session: SessionDep, model: str, revision: str, evaluation_id: UUID, *, form: Filled = NOTHING
) -> Response:
    found = evaluations.read_evaluation(session, model_name=model, revision=revision, evaluation_id=evaluation_id)
    under_way = found.state not in ENDED
    return page(
        request,
        "evaluation.html",
        form=form,
        live=under_way,
        under_way=under_way,
        model=model,
        evaluation=found,
        scores=SCORES,
    )


@router.get(EVALUATED + "/files/{name}")
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
    file = evaluations.find_file(session, model_name=model, revision=revision, evaluation_id=evaluation_id, name=name)
    headers = {} if name.endswith(".png") else {"Content-Disposition": f'attachment; filename="{file.path}"'}
    return send_file(request, file, store=store, headers=headers, redirect=False)
