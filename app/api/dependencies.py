"""What routes ask for: a session, the settings, the store, a page. Authentication is in `app.auth.dependencies`."""

from typing import Annotated, TypeVar
from uuid import UUID

import anyio
from fastapi import Depends, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.db.engine import Sessions
from app.db.pagination import PageCursor
from app.settings import Settings
from app.storage.store import Store
from emender.schemas.common import Page

Item = TypeVar("Item")


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


class NextPageLink:
    """Set the `Link` header of a response to the page after the one that it returns."""

    def __init__(self, request: Request, response: Response) -> None:
        self._request, self._response = request, response

    def __call__(self, page: Page[Item]) -> Page[Item]:
        self.set(page.next)
        return page

    def set(self, cursor: str | None) -> None:
        if cursor is not None:
            url = self._request.url.include_query_params(cursor=cursor)
            self._response.headers["Link"] = f'<{url}>; rel="next"'


Limit = Annotated[int, Query(ge=1, le=500)]


async def get_page_cursor(
    limit: Limit = 50, cursor: Annotated[UUID | None, Query(description="`next` of the previous page")] = None
) -> PageCursor[UUID]:
    return PageCursor(limit, cursor)


async def get_numbered_page_cursor(
    limit: Limit = 50,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63, description="`next` of the previous page")] = None,
) -> PageCursor[int]:
    return PageCursor(limit, cursor)


PageDep = Annotated[PageCursor[UUID], Depends(get_page_cursor)]
NumberedPageDep = Annotated[PageCursor[int], Depends(get_numbered_page_cursor)]
NextPageLinkDep = Annotated[NextPageLink, Depends()]
