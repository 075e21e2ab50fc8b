"""Waiting for work: the long poll (`Prefer: wait`, RFC 7240) and the stream of server-sent events.

Who waits holds neither a thread nor a connection: the database is looked at now and then in a short read. Those reads
take turns at few threads of their own, and are the rarer the more clients wait.
"""

import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Header, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.db.engine import Sessions
from app.problems import Unavailable
from emender.schemas.common import ENDED, WorkStatus

PAUSE = 0.5
READERS = 4
READS_PER_SECOND = 100
MOST_WAITING = 1_000
KEEP_ALIVE = 15.0
LONGEST_WAIT = 60
WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})")

STATUS = WorkStatus.model_json_schema(ref_template="#/components/schemas/{model}")
STATUS.pop("$defs")
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events `state` and `progress`, until the work has ended",
        "content": {"text/event-stream": {"schema": STATUS}},
    },
    204: {"description": "the work has ended, and `Last-Event-ID` was its last event: do not reconnect"},
}
"""For the `responses=` of a route that streams events."""

Out = TypeVar("Out")
Read = Callable[[Session], Out]


class Watch:
    """Those who wait in this process; made where its event loop runs, one for the application."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.waiting = 0
        self.readers = CapacityLimiter(READERS)

    async def settled(self, status: Read[WorkStatus], read: Read[Out], *, seconds: int) -> Out:
        """What is read once the work has ended, or as it is after so many seconds."""
        deadline = time.monotonic() + seconds
        if seconds:
            with self._one_more():
                while (await self._status(status)).state not in ENDED:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    await anyio.sleep(min(self._pause, left))
        return await run_in_threadpool(self._read, read)

    async def events(self, status: Read[WorkStatus], *, known: str | None) -> Response:
        """A stream of the status as it is, unless that is `known`, then of each change, until the work has ended.

        An event tells all that there is to know, so one who was away misses nothing but steps in between.
        """
        first = await self._status(status)
        if first.state in ENDED and known == event_id(first):
            return Response(status_code=204)
        if self.waiting >= MOST_WAITING:
            raise Unavailable(f"{self.waiting} clients wait here already; retry.", headers={"Retry-After": "5"})
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._changes(status, known), media_type="text/event-stream", headers=headers)

    async def _changes(self, status: Read[WorkStatus], known: str | None) -> AsyncIterator[bytes]:
        state, sent = None, time.monotonic()
        with self._one_more():
            while True:
                found = await self._status(status)
                now = event_id(found)
                if now != known:
                    name = "progress" if found.state == state else "state"
                    yield format_sse_event(data_str=found.model_dump_json(), event=name, id=now)
                    known, state, sent = now, found.state, time.monotonic()
                elif time.monotonic() - sent > KEEP_ALIVE:
                    yield b": still here\n\n"
                    sent = time.monotonic()
                if found.state in ENDED:
                    return
                await anyio.sleep(self._pause)

    @property
    def _pause(self) -> float:
        return max(PAUSE, self.waiting / READS_PER_SECOND)

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _status(self, status: Read[WorkStatus]) -> WorkStatus:
        return await to_thread.run_sync(self._read, status, limiter=self.readers)

    def _read(self, read: Read[Out]) -> Out:
        with self.sessions() as session:
            return read(session)


def event_id(status: WorkStatus) -> str:
    """Names what a client knows; equal ids mean that there is nothing new to tell."""
    return hashlib.sha256(status.model_dump_json().encode()).hexdigest()[:16]


async def get_watch(request: Request) -> Watch:
    watch: Watch = request.app.state.watch
    return watch


async def get_wait(
    watch: Annotated[Watch, Depends(get_watch)],
    response: Response,
    prefer: Annotated[
        str | None,
        Header(
            description=f"`wait=30` answers once the work has ended, at most so many seconds (up to {LONGEST_WAIT}) "
            "later: RFC 7240",
            examples=["wait=30"],
        ),
    ] = None,
) -> int:
    """The seconds that the client is willing to wait, as many as are granted: none where too many wait already."""
    wait = WAIT.search(prefer or "")
    if wait is None or watch.waiting >= MOST_WAITING:
        return 0
    seconds = min(int(wait[1]), LONGEST_WAIT)
    response.headers["Preference-Applied"] = f"wait={seconds}"
    return seconds


WatchDep = Annotated[Watch, Depends(get_watch)]
WaitDep = Annotated[int, Depends(get_wait)]
LastEventId = Annotated[str | None, Header(description="what the client knows already", max_length=64)]
