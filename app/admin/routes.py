"""All pages: what the calls of the same scope give and do, for people."""

from fastapi import APIRouter
from starlette.responses import Response

from app.admin import aliases, applying, audit, checkpoints, edits, keys, models, overview, sessions
from app.admin.access import PageRoute, Reader
from app.problems import NotFound

rest = APIRouter(route_class=PageRoute)


@rest.get("/{path:path}")
def nothing(_: Reader) -> Response:
    raise NotFound("There is no page at this address; the overview leads to all that there are.")


ROUTERS = (
    *(room.router for room in (sessions, overview, models, edits, checkpoints, aliases, applying, keys, audit)),
    rest,
)
