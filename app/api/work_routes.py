"""Routes of work that clients wait for: a read that can wait for its end, and a stream of its events."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from app.api.transactions import adopt_signature
from app.api.waiting import WaitDep, WatcherDep
from app.auth.dependencies import ReadPrincipal
from app.jobs.queries import Work, work_status
from app.problems import Problem, documented
from emender.schemas.common import WorkStatus

Read = TypeVar("Read", bound=Callable[..., Any])
LastEventId = Annotated[str | None, Header(description="the id of the last event that was received", max_length=64)]

STATUS = WorkStatus.model_json_schema(ref_template="#/components/schemas/{model}")
STATUS.pop("$defs")
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events `state` and `progress`, until the work is done",
        "content": {"text/event-stream": {"schema": STATUS}},
    },
    204: {"description": "The work is done and `Last-Event-ID` names its last event: do not reconnect"},
}


def work_routes(
    router: APIRouter, path: str, *problems: type[Problem], find: Callable[..., Work], follow: str
) -> Callable[[Read], Read]:
    """Add an endpoint that reads work and can wait for its end, and one named `follow` that streams its events.

    `find` returns the row of the work. It takes the session and the parameters of the path, as the endpoint does.
    """

    def add(read: Read) -> Read:
        def read_status(session: Session, **arguments: Any) -> WorkStatus:
            return work_status(session, find(session, **arguments))

        async def wait_until_done(watcher: WatcherDep, _: ReadPrincipal, wait: WaitDep, **arguments: Any) -> Any:
            status = partial(read_status, **arguments)
            return await watcher.wait_until_done(status, partial(read, **arguments), seconds=wait)

        async def stream_events(
            watcher: WatcherDep, _: ReadPrincipal, last_event_id: LastEventId = None, **arguments: Any
        ) -> Response:
            return await watcher.stream_events(partial(read_status, **arguments), last_event_id=last_event_id)

        for endpoint in (wait_until_done, stream_events):
            adopt_signature(endpoint, read)
        router.get(path, responses=documented(*problems))(wait_until_done)
        router.get(
            f"{path}/events",
            name=follow,
            description="Follow the work. Each event has the whole state and progress; `Last-Event-ID` resumes.",
            response_model=None,
            response_class=StreamingResponse,
            responses={**EVENTS, **documented(*problems)},
        )(stream_events)
        return read

    return add
