"""Write `manifest.json`, which lists everything that a checkpoint was made from.

It has inputs and digests only, no time and no version number: equal inputs give equal bytes. `model.sig` signs it
together with every other file of the revision.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

MANIFEST, SIGNATURE = "manifest.json", "model.sig"
FORMAT = 2

LIBRARIES = ("diffusers", "numpy", "safetensors", "torch", "transformers")
"""Libraries whose version may change the bytes of the weights or of their files."""


@dataclass(frozen=True)
class ManifestEdit:
    """An edit as the manifest lists it."""

    id: UUID
    source: str
    destination: Mapping[str, Any]
    templates: Sequence[str]
    settings: Mapping[str, Any]
    reason: str | None
    value: str | None
    """The SHA-256 of its value. None for an edit by UCE, which has no value."""
    method: str = "text_encoder"


@dataclass(frozen=True)
class Inputs:
    """The inputs that determine a checkpoint. Settings of a method are present if the method has edits."""

    model: str
    model_source: str
    model_revision: str | None
    model_digest: str
    model_license: Mapping[str, str] | None
    """`id`, and optionally `name` and `link`."""
    model_files: Mapping[str, str]
    """The SHA-256 of each file of the base model, including the files that edited ones replace."""
    statistics: str | None
    engine: str
    libraries: Mapping[str, str]
    """Library versions by name."""
    edits: Sequence[ManifestEdit]
    alpha: float | None
    layers: Mapping[str, Sequence[int]]
    """By text encoder."""
    projection_method: str
    """The method of edits that are not written into a text encoder."""
    options: Mapping[str, Any]
    """`residual_schedule`, `moment_weight`, `contexts` and `preserve` of the text encoder's edits; arguments of UCE."""

    def edits_by(self, method: str) -> list[ManifestEdit]:
        return [edit for edit in self.edits if edit.method == method]


def build_manifest(inputs: Inputs, *, files: Mapping[str, str]) -> bytes:
    """Return the manifest as JSON. `files` maps the path of each other file of the revision to its SHA-256."""
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
        "files": dict(files),
    }
    if inputs.model_license is not None:
        content["base_model"]["license"] = dict(inputs.model_license)
    if inputs.statistics is not None:
        content["statistics"] = {"digest": inputs.statistics}
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _edit(edit: ManifestEdit) -> dict[str, Any]:
    content = asdict(edit) | {"id": str(edit.id)}
    del content["method" if edit.method == "text_encoder" else "value"]
    return content


def compute_commit(files: Iterable[tuple[str, str]]) -> str:
    """Return the commit of a revision with these (path, SHA-256): 40 hex digits that change with any byte.

    The signature does not count: ECDSA is randomized, and equal inputs must give equal commits.
    """
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files) if path != SIGNATURE)
    return hashlib.sha256(lines.encode()).hexdigest()[:40]
