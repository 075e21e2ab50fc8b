"""A base model and its statistics."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.admin.access import Admin, PageRoute, Reader
from app.admin.forms import Filled, FormDep, asked, attempt, document, word
from app.admin.rendering import NOTHING, page, see
from app.api.dependencies import PageDep, SessionDep, SettingsDep, StoreDep
from app.checkpoints.routes import ModelName
from app.models import service
from app.problems import Problem
from emender.schemas.common import ENDED
from emender.schemas.models import StatisticsCreate

router = APIRouter(route_class=PageRoute)

STATISTICS = {"/captions": word, "/samples": word}


@router.get("/models/{model}")
def show_model(request: Request, session: SessionDep, _: Reader, model: ModelName, listed: PageDep) -> Response:
    return _model_page(request, session, model, listed)


@router.post("/models/{model}/statistics")
def estimate_statistics(
    request: Request,
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: Admin,
    model: ModelName,
    listed: PageDep,
    form: FormDep,
) -> Response:
    created = attempt(
        session,
        lambda: service.create_statistics(
            session,
            name=model,
            statistics=asked(StatisticsCreate, document(form, STATISTICS)),
            model_roots=settings.model_roots,
            store=store,
            actor=principal.actor,
        ),
    )
    if isinstance(created, Problem):
        return _model_page(request, session, model, listed, form=form.refused(created))
    return see(request, f"/models/{model}")


def _model_page(
    request: Request, session: SessionDep, model: str, listed: PageDep, *, form: Filled = NOTHING
) -> Response:
    found = service.read_model(session, name=model)
    estimates = service.list_statistics(session, name=model, page=listed)
    under_way = not {found.state, *(one.state for one in estimates.items)} <= ENDED
    return page(
        request,
        "base_model.html",
        form=form,
        live=under_way,
        model=found.name,
        found=found,
        estimates=estimates,
        under_way=under_way,
    )
