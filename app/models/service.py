"""Register base models and estimate their statistics."""

from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import Model, Statistics
from app.db.pagination import PageCursor
from app.jobs.enqueue import enqueue
from app.jobs.kinds import ESTIMATE_STATISTICS, REGISTER_MODEL
from app.jobs.queries import running_progress
from app.models import queries, roots
from app.models.captions import pack_captions
from app.models.errors import ModelAlreadyExists, ModelNotFailed, StatisticsInProgress, StatisticsNotFound
from app.problems import Unprocessable
from app.storage.references import pause_collection
from app.storage.store import Store
from emender.schemas.common import Page
from emender.schemas.models import ModelCreate, ModelOut, StatisticsCreate, StatisticsOut


def register_model(
    session: Session, *, model: ModelCreate, namespace: str, model_roots: Sequence[Path], actor: str
) -> ModelOut:
    """Enqueue the registration of a model. The name of a failed registration can be used again.

    `model_roots` are empty where the API has no access to them. The worker then checks the folder.
    """
    if "/" not in model.source and model_roots and roots.find_folder(model_roots, model.source) is None:
        raise Unprocessable.at(
            "/source",
            f"There is no folder {model.source!r} directly under the model roots. Put the pipeline there, or give a "
            "Hub id such as stabilityai/sd-turbo.",
        )
    row = queries.find_model(session, name=model.name, lock=True)
    if row is not None and row.state != "failed":
        raise ModelAlreadyExists(f"The model {model.name!r} already exists and is {row.state}; choose another name.")
    before = {"state": row.state} if row else None
    row = row or Model(name=model.name)
    row.namespace = model.namespace or namespace
    row.source, row.revision, row.classifier = model.source, model.revision, model.classifier
    row.license = model.license.model_dump(exclude_none=True) if model.license else None
    row.state, row.problem, row.created_by = "registering", None, actor
    session.add(row)
    try:
        session.flush()
    except IntegrityError:  # a concurrent request registered the name first
        raise ModelAlreadyExists(f"The model {model.name!r} already exists; choose another name.") from None
    enqueue(session, kind=REGISTER_MODEL, target_id=row.id, actor=actor)
    details = {name: getattr(row, name) for name in ("source", "revision", "namespace", "classifier", "license")}
    target, after = f"model:{row.name}", {"state": row.state}
    record(session, actor=actor, action="model.register", target=target, details=details, before=before, after=after)
    session.refresh(row)
    return _models_out(session, [row])[0]


def list_models(session: Session, *, page: PageCursor[UUID]) -> Page[ModelOut]:
    rows, next_cursor = page.fetch(session, select(Model), Model.id)
    return Page(items=_models_out(session, rows), next=next_cursor)


def read_model(session: Session, *, name: str) -> ModelOut:
    return _models_out(session, [queries.get_model(session, name=name)])[0]


def delete_model(session: Session, *, name: str, actor: str) -> None:
    """Delete a model whose registration failed: nothing references it. Raises `ModelNotFailed`."""
    row = queries.get_model(session, name=name, lock=True)
    if row.state != "failed":
        raise ModelNotFailed(f"The model {name!r} is {row.state}; only one whose registration failed can be deleted.")
    before = {"state": row.state}
    record(session, actor=actor, action="model.delete", target=f"model:{name}", details=row.problem, before=before)
    session.delete(row)


def create_statistics(
    session: Session, *, name: str, statistics: StatisticsCreate, model_roots: Sequence[Path], store: Store, actor: str
) -> StatisticsOut:
    """Store the captions and enqueue the estimate of their second moments."""
    model = queries.get_ready_model(session, name=name, lock=True)
    if other := queries.newest_statistics(session, model_id=model.id, states=("queued", "estimating")):
        raise StatisticsInProgress(
            f"Statistics of {name!r} are being estimated; see /v1/models/{name}/statistics/{other.id}."
        )
    content, count = _pack_captions(statistics, model_roots=model_roots)
    pause_collection(session)
    row = Statistics(
        model_id=model.id,
        captions_name=statistics.captions if isinstance(statistics.captions, str) else "uploaded",
        captions_sha256=store.put(content),
        captions=count,
        created_by=actor,
    )
    session.add(row)
    session.flush()
    enqueue(session, kind=ESTIMATE_STATISTICS, target_id=row.id, actor=actor)
    details = {"statistics": str(row.id), "captions": row.captions_name, "sha256": row.captions_sha256, "count": count}
    target, after = f"model:{model.name}", {"state": "queued"}
    record(session, actor=actor, action="statistics.create", target=target, details=details, after=after)
    session.refresh(row)
    return StatisticsOut.model_validate(row)


def list_statistics(session: Session, *, name: str, page: PageCursor[UUID]) -> Page[StatisticsOut]:
    query = select(Statistics).where(Statistics.model_id == queries.get_model(session, name=name).id)
    rows, next_cursor = page.fetch(session, query, Statistics.id)
    return Page(items=_statistics_out(session, rows), next=next_cursor)


def read_statistics(session: Session, *, model: str, statistics_id: UUID) -> StatisticsOut:
    return _statistics_out(session, [find_statistics(session, model=model, statistics_id=statistics_id)])[0]


def find_statistics(session: Session, *, model: str, statistics_id: UUID) -> Statistics:
    """Return statistics of the model of that name. Raises `ModelNotFound` or `StatisticsNotFound`."""
    model_id = queries.get_model(session, name=model).id
    row = session.get(Statistics, statistics_id)
    if row is None or row.model_id != model_id:
        raise StatisticsNotFound(f"The model {model!r} has no statistics {statistics_id}.")
    return row


def _pack_captions(statistics: StatisticsCreate, *, model_roots: Sequence[Path]) -> tuple[bytes, int]:
    if isinstance(statistics.captions, str):
        file = roots.find_captions(model_roots, statistics.captions)
        if file is None:
            raise Unprocessable.at(
                "/captions",
                f"There is no {statistics.captions}.txt directly under the model roots. Put it there, or send the "
                "captions as a list.",
            )
        with file.open(encoding="utf-8", errors="replace") as lines:
            content, count = pack_captions(lines, samples=statistics.samples)
    else:
        content, count = pack_captions(statistics.captions, samples=statistics.samples)
    if count == 0:
        raise Unprocessable.at("/captions", "All captions are blank; send at least one with text.")
    return content, count


def _statistics_out(session: Session, rows: Sequence[Statistics]) -> list[StatisticsOut]:
    progress = running_progress(session, target_ids=[row.id for row in rows])
    return [StatisticsOut.model_validate(row).model_copy(update={"progress": progress.get(row.id)}) for row in rows]


def _models_out(session: Session, rows: Sequence[Model]) -> list[ModelOut]:
    ids = [row.id for row in rows]
    best = queries.best_statistics(session, model_ids=ids)
    statistics = dict(zip(best, _statistics_out(session, list(best.values())), strict=True))
    progress = running_progress(session, target_ids=ids)
    return [
        ModelOut.model_validate(row).model_copy(
            update={
                "methods": queries.list_methods(row),
                "statistics": statistics.get(row.id),
                "progress": progress.get(row.id),
            }
        )
        for row in rows
    ]
