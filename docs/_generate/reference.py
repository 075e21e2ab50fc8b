"""Reference pages out of the code: `python -m docs._generate.reference` writes them, a test holds them against it.

`docs/reference/api.md` and `schemas.md` say what the OpenAPI document says, `settings.md` what `app/settings.py` says,
`cli.md` what `emender --help` says and `exit-codes.md` what `app/cli/errors.py` says.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from itertools import cycle
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from app.cli import main as cli
from app.cli.errors import ExitCode
from app.main import EVERYWHERE, create_app
from app.problems import ContentTooLarge, MalformedBody, Problem, RequestTimeout
from app.settings import Settings

FOLDER = Path(__file__).parents[1] / "reference"
BY = "Written by `make reference`, out of {}; a test holds it against them.\n"
SCHEMAS = "#/components/schemas/"
OF_BODIES = (MalformedBody, RequestTimeout, ContentTooLarge)
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
}

Document = Mapping[str, Any]


def pages() -> dict[str, str]:
    """Each page's text by its file's name."""
    document = create_app(Settings(database_url=SecretStr("postgresql://unused"))).openapi()
    return {
        "api.md": api(document),
        "schemas.md": schemas(document),
        "settings.md": settings(),
        "cli.md": commands(),
        "exit-codes.md": exit_codes(),
    }


def api(document: Document) -> str:
    """Every operation by its tag, and every event that webhooks send."""
    lines = [
        "# API\n",
        BY.format("the OpenAPI document, which a running service gives as `/openapi.json` and shows at `/docs`"),
        "A call carries `Authorization: Bearer em_…`, a key with the scope that is named. Lists are pages: `limit`, "
        "and the `next` of a page as `cursor`. A POST may carry an `Idempotency-Key`, any token of yours: sent again "
        "under it within 24 hours, it is not done again but gets the first answer, with `Idempotency-Replayed: true`. "
        "Errors are [problems](problems.md). "
        f"Any call below `/v1` may answer {_problems(EVERYWHERE)}; one with a body also {_problems(OF_BODIES)}. "
        "They are not said again. A star marks what must be given.\n",
    ]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for tag in dict.fromkeys(operation["tags"][-1] for _, _, operation in operations):
        lines.append(f"## {tag.capitalize()}\n")
        for path, method, operation in operations:
            if operation["tags"][-1] == tag:
                lines += _operation(path, method, operation)
    lines.append("## Events\n")
    lines.append("What a webhook is sent; see [Receive webhooks](../how-to/webhooks.md).\n")
    lines += _table(
        ("event", "body"),
        [
            (f"`{name}`", _kind(event["post"]["requestBody"]["content"]["application/json"]["schema"]))
            for name, event in document["webhooks"].items()
        ],
    )
    return "\n".join(lines)


def schemas(document: Document) -> str:
    """Every object that is sent or answered, by its name."""
    lines = ["# Schemas\n", BY.format("the OpenAPI document"), "The objects that the [API](api.md) takes and gives.\n"]
    for name, schema in document["components"]["schemas"].items():
        lines.append(f"## {name}\n")
        if text := schema.get("description"):
            lines.append(_text(text) + "\n")
        required = schema.get("required", ())
        rows = [
            (f"`{field}`" + (" *" if field in required else ""), _kind(of), _meaning(of))
            for field, of in schema.get("properties", {}).items()
        ]
        lines += _table(("field (* always there)", "what it is", "meaning"), rows)
    return "\n".join(lines)


def settings() -> str:
    """Every variable that the service and its commands read."""
    rows = [
        (f"`EMENDER_{name.upper()}`", _default(field), _text(field.description or ""))
        for name, field in Settings.model_fields.items()
    ]
    lines = [
        "# Settings\n",
        BY.format("`app/settings.py`"),
        "Read from the environment, else from files named as the variable in lower case in `/run/secrets`, such as "
        "`/run/secrets/emender_database_url`. API, workers and commands read the same ones.\n",
        *_table(("variable", "default", "what it does"), rows),
    ]
    return "\n".join(lines)


def commands() -> str:
    """Every command, its arguments and options, as typer tells them."""
    group = get_command(cli.app)
    told = get_docs_for_click(obj=group, ctx=Context(group), name="emender", title="Commands")
    title, _, rest = told.strip().partition("\n\n")
    return "\n".join(
        [title, "", BY.format("the commands"), rest.replace(cli.EXIT_CODES, "[Exit codes](exit-codes.md)"), ""]
    )


def exit_codes() -> str:
    """What a command ends with."""
    lines = [
        "# Exit codes\n",
        BY.format("`app/cli/errors.py`"),
        "Of `emender`, and of `deploy/pull.py`, which shares them. A script can tell by them what to do: try again "
        "(3, 8, 13), ask an admin (4), look at what it asked for (2, 5, 11), read the state again and decide anew "
        "(12), or call someone (1, 6, 7).\n",
        *_table(("code", "meaning"), [(str(code.value), code.__doc__ or "") for code in ExitCode]),
    ]
    return "\n".join(lines)


def write() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def _operation(path: str, method: str, operation: Document) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`\n"
    yield _text(operation["description"]) + "\n"
    security = operation.get("security")
    scopes = [scope for each in security or () for scopes in each.values() for scope in scopes]
    if scopes:
        yield f"Scope: `{'`, `'.join(scopes)}`.\n"
    else:
        yield "Any key.\n" if security else "No key.\n"
    parameters = [each for each in operation.get("parameters", ()) if each["name"] != "idempotency-key"]
    rows = [(_name(each), each["in"], _kind(each["schema"]), _meaning(each)) for each in parameters]
    yield from _table(("parameter", "in", "what it is", "meaning"), rows)
    if body := operation.get("requestBody"):
        kinds = [f"{_kind(content['schema'])} as `{media}`" for media, content in body["content"].items()]
        yield f"Body: {', or '.join(kinds)}. {_text(body.get('description', ''))}".strip() + "\n"
    answers = {int(status): answer for status, answer in operation["responses"].items()}
    for status, answer in answers.items():
        if status < 400:
            yield f"**{status}** {_answer(status, answer)}.\n"
    said = {int(problem.status) for problem in (*EVERYWHERE, *OF_BODIES)}
    problems = [
        f"{status} " + ", ".join(_problem(name) for name in answer["description"].split(", "))
        for status, answer in answers.items()
        if status >= 400 and status not in said
    ]
    if problems:
        yield f"Problems: {'; '.join(problems)}.\n"


def _name(parameter: Document) -> str:
    return f"`{parameter['name']}`" + (" *" if parameter.get("required") else "")


def _problems(problems: Iterable[type[Problem]]) -> str:
    return ", ".join(f"{int(problem.status)} {_problem(problem.title)}" for problem in problems)


def _problem(title: str) -> str:
    return f"[{title}](problems.md#{slug(title)})"


def _answer(status: int, response: Document) -> str:
    given = [_kind(content["schema"]) for content in response.get("content", {}).values() if content.get("schema")]
    described = _text(response["description"]).removesuffix(".")
    said = HTTPStatus(status).phrase if described == "Successful Response" else described
    return said + (": " + " or ".join(dict.fromkeys(given)) if given else "")


def _kind(schema: Document) -> str:
    """What a value is: its type, and the bounds of it."""
    if ref := schema.get("$ref"):
        name = ref.removeprefix(SCHEMAS)
        return f"[{name}](schemas.md#{slug(name)})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_kind(each) for each in schema[several]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    bounds = [text.format(f"{schema[name]:,}") for name, text in BOUNDS.items() if name in schema]
    match schema.get("type"):
        case "array":
            kind = f"list of {_kind(schema.get('items', {}))}"
        case "object":
            of = schema.get("additionalProperties")
            kind = f"object of {_kind(of)}" if isinstance(of, dict) else "object"
        case None:
            kind = "any"
        case kind:
            kind = schema.get("format", kind)
    return ", ".join([kind, *bounds])


def _meaning(schema: Document) -> str:
    default = schema.get("default", schema.get("schema", {}).get("default"))
    said = [_text(schema.get("description", ""))]
    if default not in (None, [], {}):
        said.append(f"default `{default}`")
    return "; ".join(filter(None, said))


def _default(field: FieldInfo) -> str:
    match field.default:
        case None | ():
            return ""
        case int() as number if not isinstance(number, bool) and number >= 10_000:
            return f"{number:,}"
        case bool() as flag:
            return str(flag).lower()
        case value:
            return f"`{value}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (list(head), ["---"] * len(head), *cells)] + [""]


def _text(description: str) -> str:
    """On one line; what looks like a tag is none."""
    parts = " ".join(description.split()).split("`")
    return "`".join(part if code else part.replace("<", "&lt;") for part, code in zip(parts, cycle((False, True))))


def slug(heading: str) -> str:
    """The anchor of a heading, as the builder makes it."""
    return re.sub(r"[^\w-]+", "-", heading.lower()).strip("-")


if __name__ == "__main__":
    write()
