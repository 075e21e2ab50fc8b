"""Waiting for an edit: the long poll and the stream of events. Both look at the database, each time in a short read.

They are coroutines, since a thread for each waiting client would leave none for the others.
"""

import hashlib
import time
from collections.abc import AsyncIterator
from uuid import UUID

import anyio
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from app.db.engine import Sessions
from app.edits import service
from app.edits.schemas import EditEvent, EditOut

ENDED = ("ready", "failed", "cancelled")
PAUSE = 0.5
KEEP_ALIVE = 15.0


async def settled(sessions: Sessions, *, edit_id: UUID, seconds: float) -> EditOut:
    """The edit once it has ended, or as it is after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        edit = await run_in_threadpool(_read, sessions, edit_id)
        left = deadline - time.monotonic()
        if edit.state in ENDED or left <= 0:
            return edit
        await anyio.sleep(min(PAUSE, left))


def event_id(edit: EditOut) -> str:
    """Names what a client knows of an edit; equal ids mean that there is nothing new to tell."""
    return hashlib.sha256(_event(edit).model_dump_json().encode()).hexdigest()[:16]


async def changes(sessions: Sessions, *, edit_id: UUID, known: str | None) -> AsyncIterator[bytes]:
    """Server-sent events: the edit as it is, unless that is `known`, then each change, until it has ended.

    An event tells all that there is to know, so one who was away misses nothing but steps in between.
    """
    state, sent = None, time.monotonic()
    while True:
        edit = await run_in_threadpool(_read, sessions, edit_id)
        now = event_id(edit)
        if now != known:
            name = "progress" if edit.state == state else "state"
            yield format_sse_event(data_str=_event(edit).model_dump_json(), event=name, id=now)
            known, state, sent = now, edit.state, time.monotonic()
        elif time.monotonic() - sent > KEEP_ALIVE:
            yield b": still here\n\n"
            sent = time.monotonic()
        if edit.state in ENDED:
            return
        await anyio.sleep(PAUSE)


def _event(edit: EditOut) -> EditEvent:
    return EditEvent.model_validate(edit, from_attributes=True)


def _read(sessions: Sessions, edit_id: UUID) -> EditOut:
    with sessions() as session:
        return service.get_edit(session, edit_id=edit_id)
