"""/docs and /redoc, from files of our own: browsers of a closed network reach no CDN."""

import base64
import hashlib
import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse

from app.api.middleware.security_headers import content_policy

STATIC = "/static-offline-docs"  # where FastAPIOffline has the scripts and styles
INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)

router = APIRouter(include_in_schema=False)


@router.get("/docs")
def swagger(request: Request) -> HTMLResponse:
    """Try the calls in a browser."""
    static = request.scope["root_path"] + STATIC
    styles: dict[str, Any] = {
        "swagger_css_url": f"{static}/swagger-ui.css",
        "swagger_favicon_url": f"{static}/favicon.png",
    }
    script = f"{static}/swagger-ui-bundle.js"
    return _guarded(get_swagger_ui_html(**_describe(request), swagger_js_url=script, **styles))


@router.get("/redoc")
def redoc(request: Request) -> HTMLResponse:
    """Read the calls in a browser."""
    static = request.scope["root_path"] + STATIC
    urls = {"redoc_js_url": f"{static}/redoc.standalone.js", "redoc_favicon_url": f"{static}/favicon.png"}
    return _guarded(get_redoc_html(**_describe(request), **urls, with_google_fonts=False))


def _describe(request: Request) -> dict[str, Any]:
    return {"openapi_url": f"{request.scope['root_path']}{request.app.openapi_url}", "title": request.app.title}


def _guarded(page: HTMLResponse) -> HTMLResponse:
    """With a policy for exactly this page, which holds nothing that a client gave: its own inline scripts run."""
    hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in INLINE.findall(page.body))
    page.headers["Content-Security-Policy"] = content_policy(
        " ".join(("script-src 'self'", *(f"'sha256-{digest}'" for digest in hashes))),
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "worker-src blob:",
        "form-action 'self'",
    )
    return page
