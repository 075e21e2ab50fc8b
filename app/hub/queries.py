"""From a Hub revision to the files that it serves. Reads checkpoints, writes nothing."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.checkpoints import queries
from app.checkpoints.publish import StoredFile, base_files, own_files, served_files
from app.db.models import Checkpoint, Model


@dataclass(frozen=True)
class Revision:
    """A published checkpoint as the Hub's clients see it: the whole pipeline, edited files over unedited ones."""

    repo: str
    version: str
    commit: str
    source: str
    published_at: datetime
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class Reference:
    name: str
    commit: str


def find_model(session: Session, *, namespace: str, repo: str) -> Model | None:
    return session.scalars(select(Model).where(Model.namespace == namespace, Model.name == repo)).one_or_none()


def read_revision(session: Session, *, model: Model, checkpoint: Checkpoint) -> Revision:
    """The files of a published checkpoint."""
    assert checkpoint.commit is not None and checkpoint.published_at is not None
    return Revision(
        repo=f"{model.namespace}/{model.name}",
        version=f"v{checkpoint.number}",
        commit=checkpoint.commit,
        source=model.source,
        published_at=checkpoint.published_at,
        files=served_files(base_files(session, checkpoint=checkpoint), own_files(checkpoint)),
    )


def branches(session: Session, *, model: Model) -> list[Reference]:
    """`main` and the aliases that point at a published version."""
    main = queries.checkpoint_at(session, model_id=model.id, revision=queries.MAIN)
    named = [(queries.MAIN, main)] if main else []
    named += [(alias.name, alias.checkpoint) for alias in queries.aliases_of(session, model_id=model.id)]
    return [_reference(name, checkpoint) for name, checkpoint in named if checkpoint.state == "published"]


def tags(session: Session, *, model: Model) -> list[Reference]:
    """The published versions, oldest first."""
    published = queries.checkpoints_of(model.id).where(Checkpoint.state == "published").order_by(Checkpoint.number)
    return [_reference(f"v{checkpoint.number}", checkpoint) for checkpoint in session.scalars(published)]


def _reference(name: str, checkpoint: Checkpoint) -> Reference:
    return Reference(name=name, commit=checkpoint.commit or "")
