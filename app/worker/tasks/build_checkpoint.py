"""Stage II and UCE as a job: closed forms over all chosen edits, written as files, published as one version."""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy.orm import Session

import editing
from app.checkpoints import queries
from app.checkpoints.card import write_card
from app.checkpoints.files import list_files, merge_files, store_content, store_folder
from app.checkpoints.manifest import LIBRARIES, MANIFEST, SIGNATURE, Inputs, ManifestEdit, build_manifest
from app.checkpoints.publish import publish
from app.db.models import Checkpoint, Edit, JsonObject, Statistics
from app.evaluations.service import request_check
from app.jobs.leases import Lease
from app.models.queries import family_of
from app.observability.metrics import RESIDUAL, STAGE_SECONDS
from app.signing.keys import UNSIGNED, SigningKey, read_configured_key
from app.signing.service import record_key
from app.storage.references import pin_blobs
from app.storage.store import Store
from app.worker.edits import concept_edit
from app.worker.runner import JobContext
from app.worker.signature import sign_files
from editing.edits import ConceptEdit
from editing.errors import EditingError
from editing.files import File

if TYPE_CHECKING:
    from editing.encoders.base import TextEncoder
    from editing.pipelines import EditablePipeline
    from editing.stage_two.update import Update
    from editing.uce.projections import ProjectionUpdate

LORA = "adapters/lora.safetensors"
EDIT_FIELDS = ("id", "source", "destination", "templates", "settings", "reason")
"""Columns of an edit that the manifest lists as they are."""


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Build and publish the checkpoint."""
    (lease,) = leases
    with context.sessions() as session:
        work = read(session, store=context.store, checkpoint_id=lease.target_id)
    signer = read_configured_key(context.settings.signing_key_file or UNSIGNED)
    context.advance(lease, "loading")
    pipeline = context.pipelines.get(work.model_id) if work.projected else None
    with tempfile.TemporaryDirectory(prefix="emender-checkpoint-") as temporary:
        folder = Path(temporary)
        updates: list[Update] = []
        for encoder, update in solve(context, lease, work):
            editing.export_text_encoder(encoder, update, folder)
            if encoder.spec.kind != "clip":
                editing.export_adapter(encoder, update, folder / "adapters" / encoder.name)
            updates.append(update)
        editing.export_lora(updates, folder / LORA)
        projected = None
        if pipeline:
            projected = _update_projections(context, lease, work, pipeline, updates)
            editing.export_generator(pipeline, projected, folder)
        context.report(lease, "publishing")
        with STAGE_SECONDS.labels("publishing").time():
            files = store_folder(context.store, folder)
    files += _write_metadata_files(context.store, work, files, signer=signer)
    report = _report(work, updates, projected)
    with context.result(lease) as session:
        pin_blobs(session, context.store, [file.sha256 for file in files])
        checkpoint = session.get_one(Checkpoint, lease.target_id, with_for_update=True)
        if signer is not None:
            record_key(session, key=signer, actor="worker")
        publish(session, checkpoint=checkpoint, files=files, report=report)
        request_check(session, checkpoint=checkpoint)
    for edit in work.inputs.edits:
        RESIDUAL.labels(edit.method).observe(report["relative_residuals"][str(edit.id)])


def _write_metadata_files(
    store: Store, work: "BuildInputs", weights: Sequence[File], *, signer: SigningKey | None
) -> list[File]:
    """Store the card, the manifest and, if there is a key, the signature of every file that the revision serves."""
    index = json.loads(store.read(work.inputs.model_files["model_index.json"]))
    card = write_card(
        work.inputs,
        files={file.path: file.sha256 for file in weights},
        classes={name: entry[1] for name, entry in index.items() if isinstance(entry, list)},
    )
    readme = store_content(store, "README.md", card)
    served = merge_files(work.base, [*weights, readme])
    files = {path: file.sha256 for path, file in served.items()}
    manifest = store_content(store, MANIFEST, build_manifest(work.inputs, files=files))
    if signer is None:
        return [readme, manifest]
    signature = sign_files(signer, model=work.inputs.model, files=files | {MANIFEST: manifest.sha256})
    return [readme, manifest, store_content(store, SIGNATURE, signature)]


def solve(context: JobContext, lease: Lease, work: "BuildInputs") -> Iterator[tuple["TextEncoder", "Update"]]:
    """Run stage II for one text encoder after the other, each loaded up to its last edited layer."""
    values = [editing.EditValue.from_safetensors(content) for content in work.values]
    layers, solved = work.inputs.layers, 0
    total = sum(map(len, layers.values()))
    encoders = context.pipelines.load_encoders(work.model_id, {name: max(own) for name, own in layers.items()})
    for encoder in encoders if work.edits else ():
        assert work.inputs.alpha is not None and work.inputs.statistics is not None
        with STAGE_SECONDS.labels("stage_two").time():
            update = editing.compute_update(
                encoder,
                work.edits,
                values,
                context.pipelines.moments(work.inputs.statistics, encoder=encoder.name),
                alpha=work.inputs.alpha,
                moment_weight=work.inputs.options["moment_weight"],
                layers=layers[encoder.name],
                residual_schedule=work.inputs.options["residual_schedule"],
                preserve=work.inputs.options["preserve"],
                contexts=work.inputs.options.get("contexts", "own"),
                progress=lambda done, _: context.advance(lease, "solving", solved + done, total),  # noqa: B023
            )
        solved += len(update.layers)
        yield encoder, update


def _update_projections(
    context: JobContext, lease: Lease, work: "BuildInputs", pipeline: "EditablePipeline", updates: Sequence["Update"]
) -> "ProjectionUpdate":
    """UCE, on what the generator will read: the states of the text encoders as they were edited."""
    with (
        STAGE_SECONDS.labels(work.inputs.projection_method).time(),
        editing.apply_all_temporarily(pipeline.encoders, updates),
    ):
        return editing.compute_projection_update(
            pipeline,
            work.projected,
            progress=partial(context.advance, lease, "reading"),
            **work.inputs.options[work.inputs.projection_method],
        )


@dataclass(frozen=True)
class BuildInputs:
    """What the job needs, out of the database, in the checkpoint's order."""

    model_id: UUID
    inputs: Inputs
    edits: tuple[ConceptEdit, ...]
    """Those of the text encoder."""
    values: tuple[bytes, ...]
    """Of each of `edits`, as it is stored."""
    projected: tuple[ConceptEdit, ...]
    """Those of UCE."""
    base: tuple[File, ...]
    """The base model's."""


def read(session: Session, *, store: Store, checkpoint_id: UUID) -> BuildInputs:
    """Return what the checkpoint is built from, also if it is built already."""
    checkpoint = session.get_one(Checkpoint, checkpoint_id)
    model = checkpoint.model
    statistics = session.get_one(Statistics, checkpoint.statistics_id) if checkpoint.statistics_id else None
    methods = queries.edit_methods(session, checkpoint_id=checkpoint_id)
    edits = queries.list_edits(session, checkpoint_id=checkpoint_id, with_values=True)
    options = dict(checkpoint.options)
    layers = {model.encoders[0]["name"]: checkpoint.layers} if checkpoint.layers else {}
    layers = options.pop("layers", layers)  # kept apart where there are several
    in_text_encoder = [edit for edit in edits if methods[edit.id] == "text_encoder"]
    projected = [edit for edit in edits if methods[edit.id] != "text_encoder"]
    base = list_files(model)
    inputs = Inputs(
        model=model.name,
        model_source=model.source,
        model_revision=model.revision,
        model_digest=model.digest or "",
        model_license=model.license,
        model_files={file.path: file.sha256 for file in base},
        statistics=(statistics.digest or "") if statistics else None,
        engine=editing.ENGINE_VERSION,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        edits=[
            ManifestEdit(
                **{name: getattr(edit, name) for name in EDIT_FIELDS},
                value=edit.value.sha256 if edit.value and methods[edit.id] == "text_encoder" else None,
                method=methods[edit.id],
            )
            for edit in edits
        ],
        alpha=checkpoint.alpha,
        layers={encoder: tuple(own) for encoder, own in layers.items()},
        projection_method=family_of(model).projection_method,
        options=options,
    )
    return BuildInputs(
        model_id=model.id,
        inputs=inputs,
        edits=tuple(concept_edit(edit, store=store) for edit in in_text_encoder),
        values=tuple(map(_stored_value, in_text_encoder)),
        projected=tuple(concept_edit(edit, store=store) for edit in projected),
        base=tuple(base),
    )


def _stored_value(edit: Edit) -> bytes:
    """Return the value as it is stored, checked against its sha256."""
    value = edit.value
    if value is None or hashlib.sha256(value.content).hexdigest() != value.sha256:
        raise EditingError(f"the value of {edit.source!r} (edit {edit.id}) is damaged: retry that edit")
    return value.content


def _report(work: BuildInputs, updates: Sequence["Update"], projected: "ProjectionUpdate | None") -> JsonObject:
    """Report the residual of each edit and the conflicts within each method.

    The residual is that of UCE, or the larger one of the text encoders.
    """
    ids = [str(edit.id) for edit in work.inputs.edits_by("text_encoder")]
    projected_ids = [str(edit.id) for edit in work.inputs.edits_by(work.inputs.projection_method)]
    conflicts = {(conflict.kind, conflict.edits): conflict for update in updates for conflict in update.conflicts}
    report: dict[str, Any] = {
        "relative_residuals": dict(
            zip(ids, map(max, zip(*(update.relative_residuals for update in updates), strict=True)), strict=True)
        ),
        "layers": [layer for update in updates for layer in update.describe_layers()],
        "conflicts": [conflict.to_json(ids) for conflict in conflicts.values()],
    }
    if projected is not None:
        report["relative_residuals"] |= dict(zip(projected_ids, projected.relative_residuals, strict=True))
        report["projections"] = [
            {"tensor": f"{name}.weight", "relative_norm": norm} for name, norm in projected.relative_norms.items()
        ]
        report["conflicts"] += [conflict.to_json(projected_ids) for conflict in projected.conflicts]
    return report
