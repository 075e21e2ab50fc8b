"""Edits that different requests ask for at the same time, written in one transaction."""

from collections.abc import Callable, Sequence

from fastapi import FastAPI
from sqlalchemy.exc import DataError

from app.api.request_batching import Gathered
from app.edits import service
from app.edits.service import Asked
from emender.schemas.edits import EditOut

Arrivals = Gathered[Asked, EditOut]


def arrivals(app: FastAPI) -> Arrivals:
    """Queues the edits that wait. Each is there once its transaction was committed, and only then is it answered."""

    def together(asked: Sequence[Asked]) -> Sequence[EditOut | Exception]:
        state = app.state
        with state.sessions() as session:
            created = service.create_each(session, asked=asked, store=state.store, folder=state.settings.data_dir)
            session.commit()
        return created

    def create(asked: Sequence[Asked]) -> Sequence[EditOut | Exception]:
        try:
            return together(asked)
        except DataError:  # which of them the database does not take is not said
            return [_alone(together, each) for each in asked]

    return Gathered(create)


def _alone(together: Callable[[Sequence[Asked]], Sequence[EditOut | Exception]], asked: Asked) -> EditOut | Exception:
    try:
        return together([asked])[0]
    except DataError as error:
        return error
