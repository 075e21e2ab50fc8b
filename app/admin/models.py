"""Base models and their statistics."""

from fastapi import APIRouter
from starlette.responses import Response

from app.admin.access import Admin, PageRoute, Reader
from app.admin.view import ViewDep
from app.api.dependencies import PageDep, SettingsDep, StoreDep
from app.checkpoints.routes import ModelName
from app.models import service
from emender.schemas.common import ENDED
from emender.schemas.models import StatisticsCreate

router = APIRouter(route_class=PageRoute)


@router.get("/models/{model}")
def show_model(view: ViewDep, _: Reader, model: ModelName, page: PageDep) -> Response:
    found = service.read_model(view.session, name=model)
    statistics = service.list_statistics(view.session, name=model, page=page)
    live = not {found.state, *(row.state for row in statistics.items)} <= ENDED
    return view.render("base_model.html", live=live, model=found.name, found=found, statistics=statistics)


@router.post("/models/{model}/statistics")
def create_statistics(
    view: ViewDep, settings: SettingsDep, store: StoreDep, admin: Admin, model: ModelName, page: PageDep
) -> Response:
    def act() -> str:
        service.create_statistics(
            view.session,
            name=model,
            statistics=view.form.parse(StatisticsCreate),
            model_roots=settings.model_roots,
            store=store,
            actor=admin.actor,
        )
        return f"/models/{model}"

    return view.submit(act, lambda: show_model(view, admin, model, page))
