"""Load the tokenizers of a ready model from the store, once per process. Does not import torch."""

from functools import lru_cache
from pathlib import Path
from uuid import UUID

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app.db.models import ModelFile
from app.models.snapshot import snapshot
from app.storage.store import Store
from editing.families.layout import TOKENIZERS
from editing.prompts import PromptTokenizer


def tokenizers_of(session: Session, *, model_id: UUID, store: Store, folder: Path) -> tuple[PromptTokenizer, ...]:
    """Return the tokenizer of each text encoder. `folder` is `settings.data_dir`.

    Raises `BlobMissing` or `BlobCorrupt` if the store is damaged.
    """
    inside = or_(*(ModelFile.path.startswith(f"{name}/") for name in TOKENIZERS.values()))
    rows = session.execute(select(ModelFile.path, ModelFile.sha256).where(ModelFile.model_id == model_id, inside))
    files = [(path, sha256) for path, sha256 in rows]
    laid_out = snapshot(store, files, folder=folder)
    return tuple(_read(laid_out / name) for name in sorted({path.partition("/")[0] for path, _ in files}))


@lru_cache(maxsize=32)
def _read(folder: Path) -> PromptTokenizer:
    """Read a tokenizer. The name of a snapshot is the digest of its files, so the cached result stays right."""
    return PromptTokenizer.from_folder(folder)
