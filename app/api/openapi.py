"""The OpenAPI document, completed where FastAPI leaves gaps: problems by their media type, and those of every body."""

from typing import Any

from fastapi import FastAPI

from app.api.problems import MEDIA_TYPE
from app.problems import ContentTooLarge, MalformedBody, RequestTimeout, documented

PROBLEM = {"$ref": "#/components/schemas/ProblemDocument"}
OF_BODIES = documented(MalformedBody, RequestTimeout, ContentTooLarge)


def describe(app: FastAPI) -> None:
    """Let `app.openapi()` return the completed document; it is made on first use."""
    generate = app.openapi

    def completed() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            for path in document["paths"].values():
                for operation in path.values():
                    _complete(operation)
            for unused in ("HTTPValidationError", "ValidationError"):  # of FastAPI's own 422, which we never answer
                document["components"]["schemas"].pop(unused, None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = completed  # type: ignore[method-assign]


def _complete(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    if "requestBody" in operation:
        for status, response in OF_BODIES.items():
            responses.setdefault(str(status), {"description": response["description"]})
    for status, response in responses.items():
        if status.startswith(("4", "5")):
            response["content"] = {MEDIA_TYPE: {"schema": PROBLEM}}
    operation["responses"] = dict(sorted(responses.items()))
