"""Which blobs of the store the database refers to. A column that names one belongs here, or nothing keeps its blob."""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Select, Text, cast, column, func, literal, select, true, union_all
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app.db.models import Checkpoint, CheckpointFile, Edit, Evaluation, Image, Model, ModelFile, Statistics

KEPT = {
    "model_files.sha256",
    "checkpoint_files.sha256",
    "statistics.captions_sha256",
    "statistics.digest",
    "images.sha256",
    "evaluations.files",
    "edits.destination",
}
"""Columns that name blobs, as `table.column`."""

NO_BLOBS = {
    "api_keys.secret_sha256",
    "base_models.digest",
    "browser_sessions.token_sha256",
    "edit_values.sha256",
    "idempotency_keys.request_sha256",
    "audit_events.previous_hash",
    "audit_events.hash",
}
"""Columns of hashes that name no blob."""

LOCK = 0x626C6F62
"""An advisory lock of transactions: shared by those that add references, held alone by the one that deletes blobs."""


def hold_for_reference(session: Session) -> None:
    """Until this transaction ends, no blob is deleted."""
    session.execute(select(func.pg_advisory_xact_lock_shared(LOCK)))


def hold_for_deletion(session: Session) -> None:
    """Until this transaction ends, none that adds references to blobs commits; waits for those under way."""
    session.execute(select(func.pg_advisory_xact_lock(LOCK)))


def references(*, retracted: bool = True) -> Select[Any, Any]:
    """(sha256, what it is of), one row a reference; without `retracted`, not those of retracted versions' files."""
    version = literal("checkpoint:") + Model.name + "/v" + cast(Checkpoint.number, Text) + "/"
    files = func.jsonb_array_elements(Evaluation.files).table_valued(column("value", JSONB)).render_derived()
    images = func.jsonb_array_elements_text(Edit.destination["images"]).table_valued("value").render_derived()
    of_checkpoints = (
        _names(CheckpointFile.sha256, version + CheckpointFile.path)
        .join(Checkpoint, Checkpoint.id == CheckpointFile.checkpoint_id)
        .join(Model, Model.id == Checkpoint.model_id)
    )
    if not retracted:
        of_checkpoints = of_checkpoints.where(Checkpoint.state != "retracted")
    every = union_all(
        _names(ModelFile.sha256, literal("model:") + Model.name + "/" + ModelFile.path).join(
            Model, Model.id == ModelFile.model_id
        ),
        of_checkpoints,
        _names(Statistics.captions_sha256, literal("captions of statistics:") + cast(Statistics.id, Text)),
        _names(Statistics.digest, literal("statistics:") + cast(Statistics.id, Text)),
        _names(Image.sha256, literal("image:sha256:") + Image.sha256),
        _names(
            files.c.value["sha256"].astext,
            literal("evaluation:") + cast(Evaluation.id, Text) + "/" + files.c.value["name"].astext,
        )
        .select_from(Evaluation)
        .join(files, true()),
        _names(func.replace(images.c.value, "sha256:", ""), literal("edit:") + cast(Edit.id, Text))
        .select_from(Edit)
        .join(images, true())
        .where(Edit.destination.has_key("images")),
    ).subquery("every")
    return select(every.c.sha256, every.c.of).where(every.c.sha256.is_not(None))


def _names(sha256: Any, of: Any) -> Select[Any, Any]:
    return select(sha256.label("sha256"), of.label("of"))


def referenced(session: Session, *, among: Collection[str], retracted: bool = True) -> set[str]:
    """Those of these sha256 that a row refers to."""
    found = references(retracted=retracted).subquery()
    return set(session.scalars(select(found.c.sha256).where(found.c.sha256.in_(among)).distinct()))


def all_references(session: Session, *, retracted: bool = True) -> Mapping[str, list[str]]:
    """By sha256 the places that refer to it."""
    places: dict[str, list[str]] = {}
    for sha256, of in session.execute(references(retracted=retracted).execution_options(yield_per=1000)):
        places.setdefault(sha256, []).append(of)
    return places
