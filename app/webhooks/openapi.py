"""Document the events as `webhooks` of the OpenAPI document."""

from collections.abc import Callable
from typing import Annotated, get_args

from fastapi import FastAPI, Header

from app.webhooks.payloads import AnyEvent, Event

MessageId = Annotated[str, Header(description="the same at each attempt, so that receivers can drop duplicates")]
Timestamp = Annotated[int, Header(description="of this attempt, in Unix seconds")]
Signature = Annotated[
    str, Header(description="`v1,<base64>` over id, timestamp and body; after a rotation, two of them")
]


def describe_events(app: FastAPI) -> None:
    """Document what receivers are sent, each event by its docstring. None of it is served."""
    for event in get_args(AnyEvent):
        app.webhooks.post(
            event.model_fields["type"].default,
            description=f"{event.__doc__} A 2xx response within 15 seconds is success; 410 disables the webhook.",
            tags=["webhooks"],
            responses={"2XX": {"description": "received"}, "default": {"description": "retried later"}},
        )(_receiver(event))


def _receiver(event: type[Event]) -> Callable[..., None]:
    def receive(webhook_id: MessageId, webhook_timestamp: Timestamp, webhook_signature: Signature, event) -> None:  # type: ignore[no-untyped-def]
        pass

    receive.__annotations__["event"] = event
    receive.__name__ = event.__name__
    return receive
