"""`manifest.json`: everything that a checkpoint was made of, so that it can be made again and checked.

It holds inputs and digests only, no time and no version number: equal inputs give equal bytes. Signed, it vouches for
every file of its revision; `deploy.pull` reads it to verify one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from deploy.pull import FORMAT, MANIFEST, SIGNATURE

LIBRARIES = ("diffusers", "numpy", "safetensors", "torch", "transformers")
"""Whose versions may change the bytes of the weights or of their files."""


@dataclass(frozen=True)
class ManifestEdit:
    """An edit as the checkpoint holds it."""

    id: UUID
    source: str
    destination: Mapping[str, Any]
    templates: Sequence[str]
    settings: Mapping[str, Any]
    reason: str | None
    value: str | None
    """The sha256 of its value; None if it is written into cross-attention, which needs none."""
    method: str = "text_encoder"


@dataclass(frozen=True)
class Inputs:
    """What a checkpoint is a function of. Settings of a method are there where it has edits."""

    model: str
    model_source: str
    model_revision: str | None
    model_digest: str
    model_license: Mapping[str, str] | None
    """`id`, and `name` and `link` if there are such."""
    model_files: Mapping[str, str]
    """The sha256 of each file of the base model, also of those that the edited ones replace."""
    statistics: str | None
    engine: str
    libraries: Mapping[str, str]
    """Versions by name."""
    edits: Sequence[ManifestEdit]
    alpha: float | None
    layers: Mapping[str, Sequence[int]]
    """By text encoder."""
    options: Mapping[str, Any]
    """`residual_schedule`, `moment_weight`, `contexts` and `preserve` of the text encoder's edits; arguments of UCE."""

    def edits_by(self, method: str) -> list[ManifestEdit]:
        return [edit for edit in self.edits if edit.method == method]


def manifest(inputs: Inputs, *, files: Mapping[str, str]) -> bytes:
    """The manifest as JSON; `files` maps the path of every file that the revision serves to its sha256, but those of
    the manifest and of its signature."""
    settings = dict(inputs.options)
    if inputs.layers:
        layers = {encoder: list(own) for encoder, own in inputs.layers.items()}
        settings |= {"alpha": inputs.alpha, "layers": layers if len(layers) > 1 else next(iter(layers.values()))}
    content: dict[str, Any] = {
        "format": FORMAT,
        "engine": {"version": inputs.engine, "libraries": dict(inputs.libraries)},
        "base_model": {
            "name": inputs.model,
            "source": inputs.model_source,
            "revision": inputs.model_revision,
            "digest": inputs.model_digest,
            "files": dict(inputs.model_files),
        },
        "settings": settings,
        "edits": [_edit(edit) for edit in inputs.edits],
        "files": {path: sha256 for path, sha256 in files.items() if path not in (MANIFEST, SIGNATURE)},
    }
    if inputs.model_license is not None:
        content["base_model"]["license"] = dict(inputs.model_license)
    if inputs.statistics is not None:
        content["statistics"] = {"digest": inputs.statistics}
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _edit(edit: ManifestEdit) -> dict[str, Any]:
    content: dict[str, Any] = {
        "id": str(edit.id),
        "source": edit.source,
        "destination": dict(edit.destination),
        "templates": list(edit.templates),
        "settings": dict(edit.settings),
        "reason": edit.reason,
    }
    return content | ({"value": edit.value} if edit.method == "text_encoder" else {"method": edit.method})


def commit_of(files: Iterable[tuple[str, str]]) -> str:
    """The commit of a revision that serves these (path, sha256): 40 hex digits that change with any byte of it."""
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()[:40]
