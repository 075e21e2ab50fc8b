"""Run endpoints in a transaction: in one thread, from the first statement to the commit."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request
from sqlalchemy.orm import Session

from app.db.engine import Sessions
from app.settings import Settings
from app.storage.store import Store

SOURCES: Mapping[Any, str] = {
    Request: "request",
    Session: "session",
    Sessions: "sessions",
    Settings: "settings",
    Store: "store",
}
"""What an endpoint gets by the type of a parameter: the request, its session, or a part of the application's state."""


def run_in_transaction(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls the endpoint and commits, or rolls back if the endpoint raises."""

    def run(http_request: Request, **arguments: Any) -> Any:
        state = http_request.app.state
        with state.sessions(info=http_request.state.audit_origin) as session:
            own = {"request": http_request, "session": session}
            http_request.state.session = session
            arguments |= {name: own.get(source) or getattr(state, source) for name, source in passed.items()}
            result = endpoint(**arguments)
            session.commit()
            return result

    passed = adopt_signature(run, endpoint)
    return run


def adopt_signature(run: Callable[..., Any], endpoint: Callable[..., Any]) -> Mapping[str, str]:
    """Let FastAPI see `run` as the endpoint: with the endpoint's parameters, except those that `run` passes to it.

    Return those, each with its source.
    """
    signature = inspect.signature(endpoint)
    passed = {name: SOURCES[each.annotation] for name, each in signature.parameters.items() if _is_passed(each)}
    parameters = {name: each for name, each in signature.parameters.items() if name not in passed}
    parameters |= {name: each for name, each in inspect.signature(run).parameters.items() if name != "arguments"}
    functools.update_wrapper(run, endpoint)
    keyword_only = [each.replace(kind=each.KEYWORD_ONLY) for each in parameters.values()]
    run.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
    return passed


def _is_passed(parameter: inspect.Parameter) -> bool:
    try:
        return parameter.annotation in SOURCES
    except TypeError:  # an unhashable annotation
        return False
