"""What is under way, what was published, what went wrong."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.admin.access import PageRoute, Reader
from app.admin.rendering import page
from app.api.dependencies import PageDep, SessionDep
from app.checkpoints import service as checkpoints
from app.jobs import queries as jobs
from app.jobs.kinds import BUILD_CHECKPOINT
from app.models import service as models

LISTED = 10

router = APIRouter(route_class=PageRoute)


@router.get("/")
def show_overview(request: Request, session: SessionDep, _: Reader, listed: PageDep) -> Response:
    queue = jobs.queue(session, listed=LISTED)
    building = [job.target_id for job in (*queue.at_work, *queue.failed) if job.kind == BUILD_CHECKPOINT.name]
    return page(
        request,
        "overview.html",
        live=True,
        queue=queue,
        built=checkpoints.checkpoints_by_id(session, ids=building),
        models=models.list_models(session, page=listed),
        versions=checkpoints.newest_checkpoints(session),
    )
