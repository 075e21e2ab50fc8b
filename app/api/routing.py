"""What our routes have in common: `APIRouter(route_class=Route)`, or `TransactionRoute` where others set the rules."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from app.api import idempotency, strict_json
from app.api.dependencies import Transaction


class StrictRequest(Request):
    """A request whose JSON is taken as the standard has it."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = strict_json.loads(await self.body())
        return self._json


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class TransactionRoute(APIRoute):
    """Ends the request's transaction: commits it before the answer is sent, rolls it back on any error."""

    def get_handler(self) -> Handler:
        """What answers within the transaction."""
        return super().get_route_handler()

    def get_route_handler(self) -> Handler:
        handle = self.get_handler()

        async def ended(request: Request) -> Response:
            transaction = request.state.transaction = Transaction(request)
            try:
                response = await handle(request)
                await transaction.commit()
                return response
            finally:
                await transaction.close()

        return ended


class Route(TransactionRoute):
    """Strict JSON, and `Idempotency-Key` on every POST."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            options["dependencies"] = [*(options.get("dependencies") or ()), Depends(idempotency.claim)]
        super().__init__(path, endpoint, **options)

    def get_handler(self) -> Handler:
        handle = super().get_handler()

        async def idempotent(request: Request) -> Response:
            request = StrictRequest(request.scope, request.receive, request._send)
            try:
                response = await handle(request)
                claimed: idempotency.Claim | None = getattr(request.state, "idempotency", None)
                if claimed is not None and response.status_code < 300:
                    instead = getattr(request.state, "idempotent_answer", None)
                    await run_in_threadpool(idempotency.keep, claimed, response=response, instead=instead)
                return response
            except idempotency.Replayed as replayed:
                return replayed.response

        return idempotent
