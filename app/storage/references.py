"""Which rows of the database reference which blobs.

Garbage collection deletes every blob that `_select_references` does not find: add each new column that names blobs.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import Select, Text, cast, column, func, literal, select, true, union_all
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app.db.models import Checkpoint, CheckpointFile, Edit, Evaluation, Image, Model, ModelFile, Statistics
from app.storage.store import BlobMissing, Store

LOCK = 0x626C6F62
"""Advisory lock. Transactions that add references share it; one that deletes blobs holds it exclusively."""


def pin_blobs(session: Session, store: Store, digests: Iterable[str]) -> None:
    """Keep these blobs until the transaction ends. Call before adding the rows that reference them.

    Raises `BlobMissing` if garbage collection has already deleted one.
    """
    pause_collection(session)
    for sha256 in set(digests):
        if sha256 not in store:
            raise BlobMissing(sha256)


def pause_collection(session: Session) -> None:
    """Prevent the deletion of blobs until this transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock_shared(LOCK)))


def pause_references(session: Session) -> None:
    """Block transactions that add references until this one ends. Waits for those in progress."""
    session.execute(select(func.pg_advisory_xact_lock(LOCK)))


def find_referenced(session: Session, *, among: Collection[str], retracted: bool = True) -> set[str]:
    """Return those of these sha256 that a row references."""
    found = _select_references(retracted=retracted).subquery()
    return set(session.scalars(select(found.c.sha256).where(found.c.sha256.in_(among)).distinct()))


def list_references(session: Session, *, retracted: bool = True) -> Mapping[str, list[str]]:
    """Return the rows that reference each blob, such as `checkpoint:emoji/v1/README.md`, by sha256."""
    places: dict[str, list[str]] = {}
    for sha256, place in session.execute(_select_references(retracted=retracted).execution_options(yield_per=1000)):
        places.setdefault(sha256, []).append(place)
    return places


def _select_references(*, retracted: bool) -> Select[Any, Any]:
    """Select (sha256, place), one row a reference. `retracted=False` leaves out files of retracted checkpoints."""
    of_checkpoint = literal("checkpoint:") + Model.name + "/v" + cast(Checkpoint.number, Text) + "/"
    files = func.jsonb_array_elements(Evaluation.files).table_valued(column("value", JSONB)).render_derived()
    images = func.jsonb_array_elements_text(Edit.destination["images"]).table_valued("value").render_derived()
    checkpoint_files = (
        _select(CheckpointFile.sha256, of_checkpoint + CheckpointFile.path)
        .join(Checkpoint, Checkpoint.id == CheckpointFile.checkpoint_id)
        .join(Model, Model.id == Checkpoint.model_id)
    )
    if not retracted:
        checkpoint_files = checkpoint_files.where(Checkpoint.state != "retracted")
    references = union_all(
        checkpoint_files,
        _select(ModelFile.sha256, literal("model:") + Model.name + "/" + ModelFile.path).join(
            Model, Model.id == ModelFile.model_id
        ),
        _select(Statistics.captions_sha256, literal("captions of statistics:") + cast(Statistics.id, Text)),
        _select(Statistics.digest, literal("statistics:") + cast(Statistics.id, Text)),
        _select(Image.sha256, literal("image:sha256:") + Image.sha256),
        _select(
            files.c.value["sha256"].astext,
            literal("evaluation:") + cast(Evaluation.id, Text) + "/" + files.c.value["path"].astext,
        )
        .select_from(Evaluation)
        .join(files, true()),
        _select(func.replace(images.c.value, "sha256:", ""), literal("edit:") + cast(Edit.id, Text))
        .select_from(Edit)
        .join(images, true())
        .where(Edit.destination.has_key("images")),
    ).subquery()
    return select(references.c.sha256, references.c.place).where(references.c.sha256.is_not(None))


def _select(sha256: Any, place: Any) -> Select[Any, Any]:
    return select(sha256.label("sha256"), place.label("place"))
