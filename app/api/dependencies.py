"""What routes ask for: a session, the settings, the store, a page. Authentication is in `app.auth.dependencies`."""

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar, TypeVarTuple
from uuid import UUID

import anyio
from fastapi import Depends, Query, Request, Response
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session
from starlette.concurrency import run_in_threadpool

from app.db.engine import Sessions
from app.problems import Unprocessable
from app.settings import Settings
from app.storage.store import Store
from emender.schemas.common import Page

Item = TypeVar("Item")
Key = TypeVar("Key", UUID, int)
Columns = TypeVarTuple("Columns")


TRANSACTIONS = 10
"""How many requests may be in their transaction at once, half of the connections that the pool opens. Each holds a
connection between two turns in the thread pool; were there more of them than connections, threads would wait for
connections, and those who hold them for a thread. The others wait for their turn, and hold neither."""


class Transaction:
    """The request's one transaction, begun once something asks for its session: what needs none waits for none.

    Its route ends it (`app.api.routing`). The session's `info` is what audit events say of the request.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._limiter: anyio.CapacityLimiter = request.app.state.transactions
        self._session: Session | None = None

    @property
    def begun(self) -> bool:
        return self._session is not None

    async def session(self) -> Session:
        """A request has one of `TRANSACTIONS` from here on: what waits for its client, as for a body, comes before."""
        if self._session is None:
            session: Session = self._request.app.state.sessions(info=origin_of(self._request))
            await self._limiter.acquire_on_behalf_of(session)
            self._session = session
        return self._session

    async def commit(self) -> None:
        if self._session is not None:
            await run_in_threadpool(self._session.commit)

    async def close(self) -> None:
        """Roll back what was not committed."""
        if self._session is None:
            return
        try:
            if self._session.in_transaction():
                with anyio.CancelScope(shield=True):
                    await run_in_threadpool(self._session.close)
        finally:
            self._limiter.release_on_behalf_of(self._session)


def transaction_of(request: Request) -> Transaction:
    transaction: Transaction = request.state.transaction
    return transaction


async def get_session(request: Request) -> Session:
    return await transaction_of(request).session()


def origin_of(request: Request) -> dict[str, str | None]:
    """What audit events say of the request that did it."""
    return {"request_id": request.state.request_id, "address": request.client.host if request.client else None}


async def get_sessions(request: Request) -> Sessions:
    """For what outlives a transaction: waiting and streaming routes, which read in many short ones."""
    factory: Sessions = request.app.state.sessions
    return factory


async def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def get_store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


SessionDep = Annotated[Session, Depends(get_session)]
SessionsDep = Annotated[Sessions, Depends(get_sessions)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
StoreDep = Annotated[Store, Depends(get_store)]


def cursor_of(place: bytes) -> str:
    """A place in a list as clients are given it."""
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def place_of(cursor: str) -> bytes:
    """The reverse of `cursor_of`. Raises `Unprocessable`."""
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise no_cursor() from None


def no_cursor() -> Unprocessable:
    return Unprocessable.at("cursor", "Not a cursor of ours; start again without one.")


def link_next(request: Request, response: Response, cursor: str) -> None:
    """The `Link` header to the next page."""
    response.headers["Link"] = f'<{request.url.include_query_params(cursor=cursor)}>; rel="next"'


@dataclass(frozen=True)
class PageRequest(Generic[Key]):
    """`?limit=&cursor=`: the cursor is the last key of the page before, as `write` gives it to clients."""

    request: Request
    response: Response
    limit: int
    after: Key | None
    write: Callable[[Key], str]

    def select(self, query: Select[*Columns], key: InstrumentedAttribute[Key]) -> Select[*Columns]:
        """This page's rows by descending `key` (a column that grows), and one more to know whether it is the last."""
        if self.after is not None:
            query = query.where(key < self.after)
        return query.order_by(key.desc()).limit(self.limit + 1)

    def page(self, rows: Sequence[object], items: Sequence[Item], keys: Sequence[Key]) -> "Page[Item]":
        """`items` of the rows that `select` chose, with the cursor and the `Link` header of the next page."""
        if len(rows) <= self.limit:
            return Page(items=list(items), next=None)
        cursor = self.write(keys[self.limit - 1])
        link_next(self.request, self.response, cursor)
        return Page(items=list(items[: self.limit]), next=cursor)


async def get_page(
    request: Request,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
) -> PageRequest[UUID]:
    """A page by ids, whose cursors are opaque."""
    after = None
    if cursor is not None:
        try:
            after = UUID(bytes=place_of(cursor))
        except ValueError:
            raise no_cursor() from None
    return PageRequest(request, response, limit=limit, after=after, write=lambda key: cursor_of(key.bytes))


async def get_numbered_page(
    request: Request,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63, description="`next` of the page before")] = None,
) -> PageRequest[int]:
    """A page by numbers, which are their own cursors."""
    return PageRequest(request, response, limit=limit, after=cursor, write=str)


PageDep = Annotated[PageRequest[UUID], Depends(get_page)]
NumberedPageDep = Annotated[PageRequest[int], Depends(get_numbered_page)]
