"""What browsers make of forms."""

from starlette.types import ASGIApp, Receive, Scope, Send


class FilledFields:
    """Middleware: leaves out of a query what is empty, since a browser also sends the fields that nobody filled in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = (field.partition(b"=") for field in scope.get("query_string", b"").split(b"&"))
        filled = b"&".join(b"".join(field) for field in fields if field[2])
        await self.app({**scope, "query_string": filled}, receive, send)
