"""The tokenizer of a ready model, read from the store once and kept. Free of torch."""

from functools import lru_cache
from pathlib import Path
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import ModelFile
from app.models.snapshot import snapshot
from app.storage.local import LocalStore
from editing.prompts import PromptTokenizer


def tokenizer_of(session: Session, *, model_id: UUID, store: LocalStore, folder: Path) -> PromptTokenizer:
    """`folder` is `settings.folder`. Raises `BlobMissing` or `BlobCorrupt` where the store is damaged."""
    files = select(ModelFile.path, ModelFile.sha256).where(
        ModelFile.model_id == model_id, ModelFile.path.startswith("tokenizer/")
    )
    laid_out = snapshot(store, [(path, sha256) for path, sha256 in session.execute(files)], folder=folder)
    return _read(laid_out / "tokenizer")


@lru_cache(maxsize=32)
def _read(folder: Path) -> PromptTokenizer:
    """A snapshot's name is the digest of its files, so what was read once stays right."""
    return PromptTokenizer.from_folder(folder)
