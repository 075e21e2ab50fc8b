"""Dependencies that routes share. Those for authentication are in `app.auth.dependencies`.

FastAPI runs these on the event loop, so none of them may block.
"""

from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import Depends, Query, Request, Response
from sqlalchemy.orm import Session

from app.db.engine import Sessions
from app.db.pagination import PageCursor
from app.settings import Settings
from app.storage.store import Store
from emender.schemas.common import Page

Item = TypeVar("Item")


SessionDep = Session
SessionsDep = Sessions
SettingsDep = Settings
StoreDep = Store


class NextPageLink:
    """Set the `Link` header of the response to the page after the one that it returns."""

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
