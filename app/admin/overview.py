"""The overview: running work, published checkpoints, failures."""

from fastapi import APIRouter
from starlette.responses import Response

from app.admin.access import PageRoute, Reader
from app.admin.view import ViewDep
from app.api.dependencies import PageDep
from app.checkpoints import service as checkpoints
from app.jobs import queries as jobs
from app.jobs.kinds import BUILD_CHECKPOINT
from app.models import service as models

MAX_JOBS = 10

router = APIRouter(route_class=PageRoute)


@router.get("/")
def show_overview(view: ViewDep, _: Reader, page: PageDep) -> Response:
    queue = jobs.queue(view.session, listed=MAX_JOBS)
    builds = [job.target_id for job in (*queue.at_work, *queue.failed) if job.kind == BUILD_CHECKPOINT.name]
    return view.render(
        "overview.html",
        live=True,
        queue=queue,
        built=checkpoints.checkpoints_by_id(view.session, ids=builds),
        models=models.list_models(view.session, page=page),
        newest=checkpoints.newest_checkpoints(view.session),
    )
