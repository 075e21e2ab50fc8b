"""The pages as an application of their own: its errors are pages too, and it is in no OpenAPI document."""

from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from app import problems
from app.admin.forms import FilledFields
from app.admin.rendering import respond
from app.admin.routes import ROUTERS

PATH = "/admin"


def mount(app: FastAPI) -> None:
    """Serve the pages on the settings, the store and the database of `app`."""
    pages = FastAPI(openapi_url=None)
    pages.state = app.state
    problems.install(pages, respond=respond)
    pages.add_middleware(FilledFields)
    pages.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    for router in ROUTERS:
        pages.include_router(router)
    app.mount(PATH, pages)
