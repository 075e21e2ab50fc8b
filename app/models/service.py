"""Register base models, estimate their statistics."""

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
from app.jobs.queries import running_progress, work_status
from app.models import captions, queries, roots
from app.models.errors import ModelExists, ModelNotFound, ModelNotReady, StatisticsNotFound, StatisticsUnderWay
from app.problems import Unprocessable
from app.storage.references import pause_collection
from app.storage.store import Store
from emender.schemas.common import Page, WorkStatus
from emender.schemas.models import ModelCreate, ModelOut, StatisticsCreate, StatisticsOut


def register_model(
    session: Session, *, model: ModelCreate, namespace: str, model_roots: Sequence[Path], actor: str
) -> ModelOut:
    """Ask a worker to fetch and check the model. A name whose registration failed may be used again.

    Where this process has model roots, a folder that is in none of them is refused at once.
    """
    if "/" not in model.source and model_roots and roots.find_folder(model_roots, model.source) is None:
        raise Unprocessable.at(
            "/source",
            f"There is no folder {model.source!r} directly under the model roots; put the pipeline there, or give a "
            "hub id such as stabilityai/sd-turbo.",
        )
    row = queries.find_model(session, name=model.name, lock=True)
    before = {"state": row.state} if row else None
    if row is None:
        row = Model(name=model.name)
    elif row.state != "failed":
        raise ModelExists(row.name, row.state)
    row.namespace = model.namespace or namespace
    row.source, row.revision, row.classifier = model.source, model.revision, model.classifier
    row.license = model.license.model_dump(exclude_none=True) if model.license else None
    row.state, row.problem, row.created_by = "registering", None, actor
    session.add(row)
    try:
        session.flush()
    except IntegrityError:
        raise ModelExists(model.name, "registering") from None  # by a request at the same time
    enqueue(session, kind=REGISTER_MODEL, target_id=row.id, actor=actor)
    details: dict[str, object] = {"source": row.source, "revision": row.revision, "namespace": row.namespace}
    details |= {"classifier": row.classifier, "license": row.license}
    record(
        session,
        actor=actor,
        action="model.register",
        target=f"model:{row.name}",
        details=details,
        before=before,
        after={"state": row.state},
    )
    session.refresh(row)
    return _out(session, [row])[0]


def list_models(session: Session, *, page: PageCursor[UUID]) -> Page[ModelOut]:
    rows, next_cursor = page.fetch(session, select(Model), Model.id)
    return Page(items=_out(session, rows), next=next_cursor)


def get_model(session: Session, *, name: str) -> ModelOut:
    return _out(session, [_find(session, name=name)])[0]


def model_status(session: Session, *, name: str) -> WorkStatus:
    return work_status(session, _find(session, name=name))


def create_statistics(
    session: Session,
    *,
    name: str,
    statistics: StatisticsCreate,
    model_roots: Sequence[Path],
    store: Store,
    actor: str,
) -> StatisticsOut:
    """Put the captions into the store and ask a worker for their second moments."""
    model = _find(session, name=name, lock=True)
    if model.state != "ready":
        raise ModelNotReady(model.name, model.state)
    under_way = select(Statistics.id).where(
        Statistics.model_id == model.id, Statistics.state.in_(("queued", "estimating"))
    )
    if (other := session.scalars(under_way.limit(1)).first()) is not None:
        raise StatisticsUnderWay(model.name, other)
    content, count = _captions(statistics, model_roots=model_roots)
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
    record(
        session,
        actor=actor,
        action="statistics.create",
        target=f"model:{model.name}",
        details=details,
        after={"state": "queued"},
    )
    session.refresh(row)
    return StatisticsOut.model_validate(row)


def list_statistics(session: Session, *, name: str, page: PageCursor[UUID]) -> Page[StatisticsOut]:
    model = _find(session, name=name)
    query = select(Statistics).where(Statistics.model_id == model.id)
    rows, next_cursor = page.fetch(session, query, Statistics.id)
    return Page(items=_statistics_out(session, rows), next=next_cursor)


def get_statistics(session: Session, *, name: str, statistics_id: UUID) -> StatisticsOut:
    return _statistics_out(session, [_find_statistics(session, name=name, statistics_id=statistics_id)])[0]


def statistics_status(session: Session, *, name: str, statistics_id: UUID) -> WorkStatus:
    return work_status(session, _find_statistics(session, name=name, statistics_id=statistics_id))


def _find(session: Session, *, name: str, lock: bool = False) -> Model:
    model = queries.find_model(session, name=name, lock=lock)
    if model is None:
        raise ModelNotFound(name)
    return model


def _find_statistics(session: Session, *, name: str, statistics_id: UUID) -> Statistics:
    model = _find(session, name=name)
    row = session.get(Statistics, statistics_id)
    if row is None or row.model_id != model.id:
        raise StatisticsNotFound(model.name, statistics_id)
    return row


def _captions(statistics: StatisticsCreate, *, model_roots: Sequence[Path]) -> tuple[bytes, int]:
    if isinstance(statistics.captions, str):
        file = roots.find_captions(model_roots, statistics.captions)
        if file is None:
            raise Unprocessable.at(
                "/captions",
                f"There is no {statistics.captions}.txt directly under the model roots; put it there, or send the "
                "captions as a list.",
            )
        with file.open(encoding="utf-8", errors="replace") as lines:
            content, count = captions.pack(lines, samples=statistics.samples)
    else:
        content, count = captions.pack(statistics.captions, samples=statistics.samples)
    if count == 0:
        raise Unprocessable.at("/captions", "All captions are blank.")
    return content, count


def _statistics_out(session: Session, rows: Sequence[Statistics]) -> list[StatisticsOut]:
    progress = running_progress(session, target_ids=[row.id for row in rows])
    return [StatisticsOut.model_validate(row).model_copy(update={"progress": progress.get(row.id)}) for row in rows]


def _out(session: Session, rows: Sequence[Model]) -> list[ModelOut]:
    ids = [row.id for row in rows]
    best = queries.best_statistics(session, model_ids=ids)
    statistics = dict(zip(best, _statistics_out(session, list(best.values())), strict=True))
    progress = running_progress(session, target_ids=ids)
    out = []
    for row in rows:
        beside = {"statistics": statistics.get(row.id), "progress": progress.get(row.id)}
        out.append(ModelOut(**_columns(row), **beside))
    return out


def _columns(row: Model) -> dict[str, object]:
    return {column.key: getattr(row, column.key) for column in Model.__table__.columns}
