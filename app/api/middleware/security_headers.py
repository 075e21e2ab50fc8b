"""What browsers are told of every answer. A page that needs more sets its own policy."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def policy(*directives: str) -> str:
    """A Content-Security-Policy under which nothing loads but what `directives` let, and no other page frames this."""
    return "; ".join(("default-src 'none'", *directives, "base-uri 'none'", "frame-ancestors 'none'"))


ALWAYS = {
    "Content-Security-Policy": policy("form-action 'none'"),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for those that know no frame-ancestors
}
HTTPS_ONLY = "max-age=31536000"


class SecurityHeaders:
    """Middleware: adds the headers that an answer does not have; HSTS where the request came by https.

    Behind a proxy, uvicorn knows that from its headers, if it is told to trust them (`FORWARDED_ALLOW_IPS`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in ALWAYS.items():
                    headers.setdefault(name, value)
                if scope["scheme"] == "https":
                    headers.setdefault("Strict-Transport-Security", HTTPS_ONLY)
            await send(message)

        await self.app(scope, receive, answer)
