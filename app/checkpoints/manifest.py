"""`manifest.json`: everything that a checkpoint was made of, so that it can be made again and checked.

It holds inputs and digests only, no time and no version number: equal inputs give equal bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

FORMAT = 1


@dataclass(frozen=True)
class ManifestEdit:
    """An edit as the checkpoint holds it."""

    id: UUID
    source: str
    destination: Mapping[str, Any]
    templates: Sequence[str]
    values: Mapping[str, str]
    """The sha256 of its value, per text encoder."""


@dataclass(frozen=True)
class Inputs:
    """What a checkpoint is a function of."""

    model: str
    model_source: str
    model_revision: str | None
    model_digest: str
    statistics: str
    engine: str
    edits: Sequence[ManifestEdit]
    alpha: float
    layers: Mapping[str, Sequence[int]]
    """By text encoder."""
    options: Mapping[str, Any]
    """`residual`, `mass` and `preserve`."""


def manifest(inputs: Inputs, *, files: Mapping[str, str]) -> bytes:
    """The manifest as JSON; `files` maps the paths of the weights to their sha256."""
    layers = {encoder: list(own) for encoder, own in inputs.layers.items()}
    content = {
        "format": FORMAT,
        "engine": inputs.engine,
        "base_model": {
            "name": inputs.model,
            "source": inputs.model_source,
            "revision": inputs.model_revision,
            "digest": inputs.model_digest,
        },
        "statistics": {"digest": inputs.statistics},
        "settings": {
            "alpha": inputs.alpha,
            "layers": layers if len(layers) > 1 else next(iter(layers.values())),
            **inputs.options,
        },
        "edits": [
            {
                "id": str(edit.id),
                "source": edit.source,
                "destination": dict(edit.destination),
                "templates": list(edit.templates),
                "values": dict(edit.values),
            }
            for edit in inputs.edits
        ],
        "files": dict(files),
    }
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def commit_of(files: Iterable[tuple[str, str]]) -> str:
    """The commit of a revision that serves these (path, sha256): 40 hex digits that change with any byte of it."""
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()[:40]
