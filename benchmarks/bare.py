"""The least service that takes an edit: one route, one row, one transaction; `benchmarks.service` compares with it.

No keys, no limits, no audit, no job: pydantic checks the body, and psycopg inserts it into the database whose URL is in
`BARE_DATABASE_URL`. Served by `uvicorn benchmarks.bare:application --factory`.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from queue import LifoQueue
from uuid import UUID

import psycopg
from fastapi import FastAPI
from psycopg.types.json import Jsonb
from pydantic import BaseModel, Field
from uuid_utils.compat import uuid7

CONNECTIONS = 20  # as many as the service's pool may open
TABLE = "CREATE TABLE bare_edits (id uuid PRIMARY KEY, source text, destination jsonb)"
INSERT = "INSERT INTO bare_edits (id, source, destination) VALUES (%s, %s, %s)"


class Destination(BaseModel):
    prompt: str = Field(min_length=1, max_length=500)


class Edit(BaseModel):
    source: str = Field(min_length=1, max_length=500)
    destination: Destination


class EditOut(Edit):
    id: UUID


def application() -> FastAPI:
    """Return the factory that uvicorn calls."""
    pool: LifoQueue[psycopg.Connection] = LifoQueue()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for _number in range(CONNECTIONS):
            pool.put(psycopg.connect(os.environ["BARE_DATABASE_URL"], autocommit=True))
        yield
        while not pool.empty():
            pool.get().close()

    app = FastAPI(lifespan=lifespan)

    @app.post("/edits", status_code=202)
    def create_edit(edit: Edit) -> EditOut:
        edit_id, connection = uuid7(), pool.get()
        try:
            with connection.transaction():
                connection.execute(INSERT, (edit_id, edit.source, Jsonb(edit.destination.model_dump())))
        finally:
            pool.put(connection)
        return EditOut(id=edit_id, **edit.model_dump())

    return app
