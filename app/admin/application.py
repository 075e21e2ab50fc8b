"""The pages as an application of their own. Its errors are pages too; it is in no OpenAPI document."""

from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from app import problems
from app.admin import aliases, apply, audit, checkpoints, edits, evaluations, keys, models, overview, sessions
from app.admin.access import PageRoute, Reader
from app.admin.forms import DropEmptyQueryMiddleware
from app.admin.view import respond
from app.api.problems import install_handlers

PATH = "/admin"

fallback = APIRouter(route_class=PageRoute)


@fallback.get("/{path:path}")
def show_not_found(_: Reader) -> Response:
    raise problems.NotFound("There is no page at this address. The overview links to all pages.")


MODULES = (sessions, overview, models, edits, checkpoints, evaluations, aliases, apply, keys, audit)
ROUTERS = (*(module.router for module in MODULES), fallback)


def mount(app: FastAPI) -> None:
    """Serve the pages with the settings, the store and the database of `app`."""
    pages = FastAPI(openapi_url=None)
    pages.state = app.state
    install_handlers(pages, respond=respond)
    pages.add_middleware(DropEmptyQueryMiddleware)
    pages.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    for router in ROUTERS:
        pages.include_router(router)
    app.mount(PATH, pages)
