"""Arguments and results that are not schemas of the API."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from emender.requests import Ids, drop_none
from emender.schemas.checkpoints import AliasOut, Contexts, Method, ResidualSchedule
from emender.schemas.edits import Destination
from emender.schemas.presets import Preset


class Alias(AliasOut):
    """An alias and its `etag`, which changes whenever the alias moves."""

    etag: str


class ApplyFields(TypedDict, total=False):
    """The fields of `ApplyCreate`, which has their meaning and defaults. `from_` is its `from`."""

    edits: Literal["ready"] | Ids
    from_: str
    add: Ids
    remove: Ids
    method: Method
    preset: Preset
    alpha: float
    layers: Sequence[int]
    residual_schedule: ResidualSchedule
    moment_weight: float
    contexts: Contexts
    preserve: Sequence[str]
    erase_scale: float
    preserve_scale: float
    regularization_weight: float
    notes: str
    alias: str


def build_apply_body(fields: ApplyFields) -> dict[str, Any]:
    """Build the body of an apply."""
    body: dict[str, Any] = drop_none(**fields)
    if "from_" in body:
        body["from"] = body.pop("from_")
    return body


def build_destination(destination: str | Destination) -> Destination:
    """Return the destination; a text is a prompt."""
    return Destination(prompt=destination) if isinstance(destination, str) else destination
