"""Load the tokenizers of a ready model from the store, once per process. Does not import torch."""

from pathlib import Path
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import Model, ModelFile
from app.models.snapshot import snapshot
from app.storage.store import Store
from editing.families.registry import FAMILIES
from editing.prompts import PromptTokenizer, load_tokenizers

_cache: dict[UUID, tuple[PromptTokenizer, ...]] = {}


def tokenizers_of(session: Session, *, model_id: UUID, store: Store, folder: Path) -> tuple[PromptTokenizer, ...]:
    """Return the tokenizer of each text encoder of a ready model, whose files never change.

    They are read and verified once per process. `folder` is the service's data directory. Raises `BlobMissing` or
    `BlobCorrupt` if the store is damaged.
    """
    if model_id in _cache:
        return _cache[model_id]
    inside = ModelFile.path.regexp_match(r"^tokenizer(_\d)?/|^text_encoder(_\d)?/config\.json$")
    rows = session.execute(select(ModelFile.path, ModelFile.sha256).where(ModelFile.model_id == model_id, inside))
    files = [(path, sha256) for path, sha256 in rows]
    laid_out = snapshot(store, files, folder=folder)
    family = session.execute(select(Model.family).where(Model.id == model_id)).scalar_one()
    _cache[model_id] = load_tokenizers(laid_out, FAMILIES[family or "sd1"])
    return _cache[model_id]
