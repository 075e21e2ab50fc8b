"""What browsers make of forms, and what we make of what they send.

A field that asks for something bears the JSON Pointer of what it gives in the body of the API's call. So a form is that
body, and what is said against the body is said of the field.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.dependencies import SessionDep
from app.problems import Problem, rejected

Schema = TypeVar("Schema", bound=BaseModel)
Result = TypeVar("Result")
Reading = Callable[[Sequence[str]], Any]


class FilledFields:
    """Middleware: leaves out of a query what is empty, since a browser also sends the fields that nobody filled in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = (field.partition(b"=") for field in scope.get("query_string", b"").split(b"&"))
        filled = b"&".join(b"".join(field) for field in fields if field[2])
        await self.app({**scope, "query_string": filled}, receive, send)


@dataclass(frozen=True)
class Filled:
    """What is in a form's fields, by their names, and what is wrong with it."""

    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problem: Problem | None = None

    @classmethod
    def of(cls, form: FormData) -> "Filled":
        """Without the files and the token."""
        names = dict.fromkeys(name for name in form if name != "form_token")
        return cls({name: [text for text in form.getlist(name) if isinstance(text, str)] for name in names})

    def refused(self, problem: Problem) -> "Filled":
        return replace(self, problem=problem)

    def value(self, name: str, default: str = "") -> str:
        return next(iter(self.fields.get(name, ())), default)

    def values(self, name: str) -> Sequence[str]:
        return self.fields.get(name, ())

    def errors(self, name: str) -> list[str]:
        """What is said against the field or a part of it."""
        found = self.problem.errors if self.problem else ()
        return [error.detail for error in found if f"{error.pointer}/".startswith(f"{name}/")]

    def field_of(self, pointer: str) -> str | None:
        """The field that what the pointer names stands in."""
        while pointer and pointer not in self.fields:
            pointer = pointer.rpartition("/")[0]
        return pointer or None

    def touched(self, *names: str) -> bool:
        """Whether one of the fields was filled in or is wrong."""
        return any(self.value(name) or self.errors(name) for name in names)


async def sent(request: Request) -> Filled:
    return Filled.of(await request.form())


FormDep = Annotated[Filled, Depends(sent)]


def word(values: Sequence[str]) -> str | None:
    """The text of a field; None where nothing was filled in."""
    return next(iter(values), "").replace("\r\n", "\n").strip() or None


def lines(values: Sequence[str]) -> list[str] | None:
    """A list, one item a line."""
    return [line.strip() for line in (word(values) or "").splitlines() if line.strip()] or None


def items(values: Sequence[str]) -> list[str] | None:
    """A list, between spaces or commas."""
    return (word(values) or "").replace(",", " ").split() or None


def checked(values: Sequence[str]) -> list[str] | None:
    """The boxes that are checked, by their values."""
    return list(values) or None


def utc(values: Sequence[str]) -> str | None:
    """A moment as browsers write it, without an offset."""
    given = word(values)
    return f"{given}Z" if given else None


def weights(values: Sequence[str]) -> dict[str, str] | None:
    """Prompts and their weights, a line each: `0.5 female doctor`."""
    pairs = [line.partition(" ") for line in lines(values) or ()]
    return {prompt.strip(): weight for weight, _, prompt in pairs} or None


def document(form: Filled, readings: Mapping[str, Reading]) -> dict[str, Any]:
    """The body that the fields make: each at the pointer that is its name. What was not filled in is not given."""
    body: dict[str, Any] = {}
    for pointer, read in readings.items():
        value = read(form.values(pointer))
        if value is not None:
            *parents, last = pointer.removeprefix("/").split("/")
            place = body
            for name in parents:
                place = place.setdefault(name, {})
            place[last] = value
    return body


def asked(schema: type[Schema], body: object) -> Schema:
    """The body as the API takes it. Raises `Unprocessable` with the pointers at which it is wrong."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise rejected([(("body", *found["loc"]), found["msg"]) for found in error.errors()]) from None


def attempt(session: SessionDep, act: Callable[[], Result]) -> Result | Problem:
    """What `act` gives, or the problem that it raises: then nothing is left of what it did."""
    try:
        with session.begin_nested():
            return act()
    except Problem as problem:
        return problem
