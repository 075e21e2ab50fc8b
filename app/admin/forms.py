"""Forms: their fields, the request body that they make, and what is wrong with it.

The name of a field is the JSON Pointer of its value in the body of the API call. So a form is that body, and the errors
of the body are the errors of its fields.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import starlette.datastructures
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from app.problems import Problem, Unprocessable, rejected

Schema = TypeVar("Schema", bound=BaseModel)
Reader = Callable[[Sequence[str]], Any]


class DropEmptyQueryMiddleware:
    """Remove empty parameters from the query: browsers also send the fields that were left empty."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parameters = (parameter.partition(b"=") for parameter in scope.get("query_string", b"").split(b"&"))
        kept = b"&".join(b"".join(parameter) for parameter in parameters if parameter[2])
        await self.app({**scope, "query_string": kept}, receive, send)


@dataclass(frozen=True)
class FormData:
    """The values of a form's fields by name, and the problem of the form."""

    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problem: Problem | None = None

    def with_problem(self, problem: Problem) -> "FormData":
        return replace(self, problem=problem)

    def value(self, name: str, default: str = "") -> str:
        return next(iter(self.fields.get(name, ())), default)

    def values(self, name: str) -> Sequence[str]:
        return self.fields.get(name, ())

    def errors(self, name: str) -> list[str]:
        """Return the errors of a field and of its parts."""
        found = self.problem.errors if self.problem else ()
        return [error.detail for error in found if f"{error.pointer}/".startswith(f"{name}/")]

    def field_of(self, pointer: str) -> str | None:
        """Return the field that contains the value at the pointer."""
        while pointer and pointer not in self.fields:
            pointer = pointer.rpartition("/")[0]
        return pointer or None

    def touched(self, *names: str) -> bool:
        """Return whether one of the fields has a value or an error."""
        return any(self.value(name) or self.errors(name) for name in names)

    def body(self, readers: Mapping[str, Reader] | None = None) -> dict[str, Any]:
        """Return the body of the fields whose names are pointers. Empty fields are left out.

        `readers` read the values of a field; by default a field is one text.
        """
        body: dict[str, Any] = {}
        for pointer, values in self.fields.items():
            value = (readers or {}).get(pointer, text_field)(values)
            if not pointer.startswith("/") or value is None:
                continue
            *parents, last = pointer.removeprefix("/").split("/")
            parent = body
            for name in parents:
                parent = parent.setdefault(name, {})
                if not isinstance(parent, dict):
                    raise Unprocessable.at(pointer, f"The field {name!r} has a value and parts.")
            parent[last] = value
        return body

    def parse(self, schema: type[Schema], readers: Mapping[str, Reader] | None = None) -> Schema:
        """Return the body as the schema. Raises `Unprocessable` with the pointers of the errors."""
        return validate(schema, self.body(readers))


EMPTY_FORM = FormData()


async def parse_form(request: Request) -> FormData:
    """Return the fields of the request's form, without its files and its token."""
    form: starlette.datastructures.FormData = await request.form()
    names = dict.fromkeys(name for name in form if name != "form_token")
    return FormData({name: [text for text in form.getlist(name) if isinstance(text, str)] for name in names})


def validate(schema: type[Schema], body: object) -> Schema:
    """Return the body as the schema. Raises `Unprocessable` with the pointers of the errors."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise rejected([(("body", *found["loc"]), found["msg"]) for found in error.errors()]) from None


def text_field(values: Sequence[str]) -> str | None:
    """Read the text of a field, or None if it is blank."""
    return next(iter(values), "").replace("\r\n", "\n").strip() or None


def lines(values: Sequence[str]) -> list[str] | None:
    """Read a list with one item per line."""
    return [line.strip() for line in (text_field(values) or "").splitlines() if line.strip()] or None


def items(values: Sequence[str]) -> list[str] | None:
    """Read a list with spaces or commas between its items."""
    return (text_field(values) or "").replace(",", " ").split() or None


def checked(values: Sequence[str]) -> list[str] | None:
    """Read the values of the boxes that are checked."""
    return list(values) or None


def utc(values: Sequence[str]) -> str | None:
    """Read a time as browsers write it, without an offset."""
    time = text_field(values)
    return f"{time}Z" if time else None


def weights(values: Sequence[str]) -> dict[str, str] | None:
    """Read prompts and their weights, one pair per line, such as `0.5 female doctor`."""
    pairs = [line.partition(" ") for line in lines(values) or ()]
    return {prompt.strip(): weight for weight, _, prompt in pairs} or None
