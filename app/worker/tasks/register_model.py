"""Register a model: store its pipeline's files by sha256, checked to be safe and of a family that can be edited."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import editing
from app.db.models import Model, ModelFile, Statistics
from app.jobs.leases import Lease
from app.jobs.states import end_resource
from app.storage.references import pin_blobs
from app.worker.runner import JobContext
from app.worker.sources import obtain, open_classifier
from editing.errors import EditingError
from editing.families.layout import SECOND_MOMENTS
from editing.files import without_marks

if TYPE_CHECKING:
    from editing.families.layout import PipelineDescription
    from editing.second_moments.moments import SecondMoments


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Register the model. Second moments beside its `model_index.json` become its statistics."""
    (lease,) = leases
    with context.sessions() as session:
        model = session.get_one(Model, lease.target_id)

    progress = partial(context.advance, lease, "downloading")
    files = obtain(model.source, revision=model.revision, settings=context.settings, progress=progress)
    with files as source, without_marks(source.folder) as folder:
        description = editing.inspect_model(folder, device=context.pipelines.prepare())
        for done, file in enumerate(description.files):
            context.advance(lease, "storing", done, len(description.files))
            if context.store.put_file(folder / file.path) != file.sha256:
                raise EditingError(f"{file.path} changed while it was read: register again", pointer="/source")
        if model.classifier is not None:
            open_classifier(model.classifier, roots=context.settings.model_roots, device="cpu")
        moments = _read_shipped_moments(folder, description)
    digest = context.store.put(moments.to_bytes()) if moments else None

    with context.result(lease) as session:
        pin_blobs(session, context.store, [file.sha256 for file in description.files] + ([digest] if digest else []))
        model = session.get_one(Model, lease.target_id)
        model.family, model.digest = description.family, description.digest
        if model.license is None and source.license is not None:
            model.license = source.license.model_dump(exclude_none=True)
        model.encoders = [asdict(encoder) for encoder in description.encoders]
        session.add_all(
            ModelFile(model_id=model.id, path=file.path, sha256=file.sha256, size=file.size)
            for file in description.files
        )
        if moments:
            session.add(
                Statistics(
                    model_id=model.id,
                    state="ready",
                    captions_name="shipped",
                    captions=moments.captions,
                    tokens=moments.tokens,
                    digest=digest,
                    created_by=model.created_by,
                )
            )
        details = {"digest": model.digest, "commit": source.commit, "statistics": digest}
        end_resource(session, lease=lease, state=lease.kind.done, details=details)


def _read_shipped_moments(folder: Path, description: "PipelineDescription") -> "SecondMoments | None":
    """Read the second moments in the pipeline's folder, if any. They must be of its own text encoders."""
    if not (folder / SECOND_MOMENTS).is_file():
        return None
    moments = editing.SecondMoments.load(folder / SECOND_MOMENTS)
    moments.require_encoders(description.encoders, pointer="/source")
    return moments
