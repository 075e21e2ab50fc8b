"""Wait for work to finish: the long poll (`Prefer: wait`, RFC 7240) and the stream of server-sent events.

Waiting requests hold no thread or connection between their reads of the status. Few threads read, and each request
reads less often the more requests wait.
"""

import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

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

POLL_SECONDS = 0.5
READER_THREADS = 4
READS_PER_SECOND = 100
MAX_WAITING = 1_000
KEEP_ALIVE_SECONDS = 15.0
MAX_WAIT_SECONDS = 60
WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})")

Out = TypeVar("Out")
Read = Callable[[Session], Out]


class StatusWatcher:
    """Reads the status of work for the waiting requests of this process. Create it in the event loop."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.waiting = 0
        self.readers = CapacityLimiter(READER_THREADS)

    async def wait_until_done(self, status: Read[WorkStatus], read: Read[Out], *, seconds: int) -> Out:
        """Return the result of `read` once the work is done, or after so many seconds."""
        deadline = time.monotonic() + seconds
        if seconds:
            with self._count_waiting():
                while (await self._read_status(status)).state not in ENDED:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    await anyio.sleep(min(self._poll_seconds, left))
        return await run_in_threadpool(self._read, read)

    async def stream_events(self, status: Read[WorkStatus], *, last_event_id: str | None) -> Response:
        """Stream the status and each change of it until the work is done.

        Every event has the whole status. So a client that reconnects misses nothing but steps in between.
        """
        first = await self._read_status(status)
        if first.state in ENDED and last_event_id == event_id(first):
            return Response(status_code=204)
        if self.waiting >= MAX_WAITING:
            raise Unavailable(f"{self.waiting} clients are waiting already; retry.", headers={"Retry-After": "5"})
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = self._events(status, last_event_id)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(self, status: Read[WorkStatus], last_id: str | None) -> AsyncIterator[bytes]:
        last_state, sent_at = None, time.monotonic()
        with self._count_waiting():
            while True:
                current = await self._read_status(status)
                current_id = event_id(current)
                if current_id != last_id:
                    name = "progress" if current.state == last_state else "state"
                    yield format_sse_event(data_str=current.model_dump_json(), event=name, id=current_id)
                    last_id, last_state, sent_at = current_id, current.state, time.monotonic()
                elif time.monotonic() - sent_at > KEEP_ALIVE_SECONDS:
                    yield format_sse_event(comment="keep-alive")
                    sent_at = time.monotonic()
                if current.state in ENDED:
                    return
                await anyio.sleep(self._poll_seconds)

    @property
    def _poll_seconds(self) -> float:
        return max(POLL_SECONDS, self.waiting / READS_PER_SECOND)

    @contextmanager
    def _count_waiting(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _read_status(self, status: Read[WorkStatus]) -> WorkStatus:
        return await to_thread.run_sync(self._read, status, limiter=self.readers)

    def _read(self, read: Read[Out]) -> Out:
        with self.sessions() as session:
            return read(session)


def event_id(status: WorkStatus) -> str:
    """Return an id of the status: a client that has it knows the status."""
    return hashlib.sha256(status.model_dump_json().encode()).hexdigest()[:16]


async def get_watcher(request: Request) -> StatusWatcher:
    watcher: StatusWatcher = request.app.state.watcher
    return watcher


WatcherDep = Annotated[StatusWatcher, Depends(get_watcher)]


async def get_wait(
    watcher: WatcherDep,
    response: Response,
    prefer: Annotated[
        str | None,
        Header(
            description="`wait=30`: respond once the work is done, after at most 30 seconds "
            f"(maximum {MAX_WAIT_SECONDS}); RFC 7240",
            examples=["wait=30"],
        ),
    ] = None,
) -> int:
    """Return the seconds that the client prefers to wait, or 0 if too many clients wait already."""
    wait = WAIT.search(prefer or "")
    if wait is None or watcher.waiting >= MAX_WAITING:
        return 0
    seconds = min(int(wait[1]), MAX_WAIT_SECONDS)
    response.headers["Preference-Applied"] = f"wait={seconds}"
    return seconds


WaitDep = Annotated[int, Depends(get_wait)]
