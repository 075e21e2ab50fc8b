"""`Idempotency-Key`: a POST that is sent again under the same key is done once and gets the first response.

The key is inserted first and the response is stored last, in the transaction that does the work. So there is never one
without the other. A concurrent request with the same key waits for that transaction in Postgres. If the process dies,
Postgres rolls back and a retry starts afresh. Only successful responses are stored: an error changed nothing, and the
same request may be sent again.
"""

import hashlib
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Header, Request, Response
from psycopg.errors import LockNotAvailable
from pydantic import BaseModel, TypeAdapter
from sqlalchemy import bindparam, delete, func, null, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.datastructures import FormData, UploadFile

from app.api.transactions import adopt_signature
from app.db.models import IdempotencyKey
from app.problems import Conflict, Unprocessable

HEADER = "Idempotency-Key"
KEPT = timedelta(hours=24)
IS_EXPIRED = IdempotencyKey.created_at < func.now() - KEPT

Key = Annotated[
    str | None,
    Header(
        alias=HEADER,
        pattern="^[!-~]{1,255}$",
        description="A token of your choice. A request that repeats one of the last 24 hours with the same key is not "
        "done again: it gets the first response and `Idempotency-Replayed: true`. A different request with the same "
        "key is refused.",
        examples=["2b6f0cc9-04d6-4c1c-a4ba-7c7b6a6d0a36"],
    ),
]

IDENTITY = (IdempotencyKey.principal, IdempotencyKey.key)
new = insert(IdempotencyKey)
CLAIM = new.on_conflict_do_update(
    index_elements=IDENTITY,
    set_={
        "request_sha256": new.excluded.request_sha256,
        "created_at": func.now(),
        **dict.fromkeys(("status", "headers", "body"), null()),
    },
    where=IS_EXPIRED,
).returning(IdempotencyKey.key)
"""Insert the key, or take over an expired one. Returns no row if the key has been used."""
THIS_KEY = (IdempotencyKey.principal == bindparam("by"), IdempotencyKey.key == bindparam("under"))
STORE = update(IdempotencyKey).where(*THIS_KEY).execution_options(synchronize_session=False)


def run_once(endpoint: Callable[..., Any], *, status_code: int) -> Callable[..., Any]:
    """Return a function that calls a POST endpoint in a transaction, once per Idempotency-Key.

    It raises 422 if the key belongs to another request. It raises 409 if the first request still runs when the
    connection's `lock_timeout` has passed.
    """
    content: TypeAdapter[Any] = TypeAdapter(inspect.signature(endpoint).return_annotation)

    def run(http_request: Request, idempotency_key: Key = None, **arguments: Any) -> Any:
        state, request = http_request.app.state, http_request
        with state.sessions(info=request.state.audit_origin) as session:
            own = {"request": request, "session": session}
            request.state.session = session
            arguments |= {name: own.get(source) or getattr(state, source) for name, source in passed.items()}
            if idempotency_key is None:
                result = endpoint(**arguments)
                session.commit()
                return result
            principal: str = request.state.principal.actor
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            parts = (request.method, request.url.path, request.url.query, media_type)
            sha256 = hashlib.sha256("".join(f"{part}\n" for part in parts).encode())
            sha256.update(_hash_form(request._form) if request._form else getattr(request, "_body", b""))
            row: dict[str, Any] = {"principal": principal, "key": idempotency_key, "request_sha256": sha256.digest()}
            try:
                claimed = session.execute(CLAIM, row).first()
            except OperationalError as error:
                if not isinstance(error.orig, LockNotAvailable):
                    raise
                raise Conflict(
                    f"The first request with the Idempotency-Key {idempotency_key!r} is still running; retry.",
                    headers={"Retry-After": "1"},
                ) from None
            if claimed is None:
                return _replay(session, **row)
            result = endpoint(**arguments)
            injected: Response | None = arguments.get("response")
            response = Response(
                content.dump_json(result, by_alias=True),
                status_code=(injected and injected.status_code) or status_code,
                headers=dict(injected.headers) if injected else None,
                media_type="application/json",
            )
            stored = getattr(request.state, "stored_result", None)
            values = {
                "status": response.status_code,
                "headers": {name: value for name, value in response.headers.items() if name != "content-length"},
                "body": content.dump_json(stored, by_alias=True) if stored else response.body,
            }
            session.execute(STORE, {"by": principal, "under": idempotency_key, **values})
            session.commit()
            return response

    passed = adopt_signature(run, endpoint)
    return run


def store_instead(request: Request, result: BaseModel) -> None:
    """Set the response to repeated requests, if the first response has a secret that must not be stored."""
    request.state.stored_result = result


def delete_expired(session: Session) -> int:
    """Delete the stored responses older than 24 hours, and return how many there were."""
    return len(session.scalars(delete(IdempotencyKey).where(IS_EXPIRED).returning(IdempotencyKey.key)).all())


def _replay(session: Session, *, principal: str, key: str, request_sha256: bytes) -> Response:
    stored = session.execute(select(IdempotencyKey).where(*THIS_KEY), {"by": principal, "under": key}).scalar_one()
    if stored.request_sha256 != request_sha256:
        raise Unprocessable.at(HEADER, "The key was used for another request; send each new request with a new key.")
    headers = {**(stored.headers or {}), "Idempotency-Replayed": "true"}
    return Response(stored.body, status_code=stored.status or 200, headers=headers)


def _hash_form(form: FormData) -> bytes:
    """Hash the fields of a form. Its bytes differ between retries, which choose new boundaries."""
    digest = hashlib.sha256()
    for name, field in form.multi_items():
        if isinstance(field, UploadFile):
            field.file.seek(0)
            content = hashlib.file_digest(field.file, "sha256").digest()  # type: ignore[arg-type]
            field.file.seek(0)
        else:
            content = hashlib.sha256(field.encode()).digest()
        digest.update(name.encode() + b"\n" + content)
    return digest.digest()
