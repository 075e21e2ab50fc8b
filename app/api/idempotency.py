"""`Idempotency-Key`: a POST sent twice is done once, and answered twice.

The answer is kept in the transaction that does the work, so there is never one without the other. A request holds its
key by an advisory lock of that transaction: where the process dies, Postgres lets go of the key and undoes the work
together, and a retry starts afresh. Only answers of success are kept: a refused request changed nothing, and may be
sent again under the same key once what refused it is mended.
"""

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import anyio
from fastapi import Header, Request, Response
from pydantic import BaseModel
from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from app.api.dependencies import transaction_of
from app.auth.dependencies import authenticate
from app.db.models import IdempotencyKey
from app.problems import Conflict, Unprocessable

HEADER = "Idempotency-Key"
KEPT = timedelta(hours=24)
PATIENCE = 5.0  # seconds that a repetition waits for the first to be answered, before it is told 409
PAUSE = 0.05


class Replayed(Exception):
    """The request was answered before; this is the answer."""

    def __init__(self, response: Response) -> None:
        self.response = response


@dataclass(frozen=True)
class Claim:
    """A key that this request holds to the end of its transaction."""

    session: Session
    principal: str
    key: str
    request_sha256: bytes


async def fingerprint(request: Request) -> bytes:
    """sha256 of what the request asks for. A form counts by its fields, since each try has another boundary.

    The body is read here, before the request has its transaction.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    digest = hashlib.sha256()
    for part in (request.method, request.url.path, request.url.query, kind):
        digest.update(part.encode() + b"\n")
    if kind == "multipart/form-data":
        for name, field in (await request.form()).multi_items():
            digest.update(name.encode() + b"\n")
            if isinstance(field, UploadFile):
                content = hashlib.sha256()
                while chunk := await field.read(1 << 20):
                    content.update(chunk)
                await field.seek(0)
                digest.update(content.digest())
            else:
                digest.update(hashlib.sha256(field.encode()).digest())
    else:
        digest.update(await request.body())
    return digest.digest()


async def claim(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern="^[!-~]{1,255}$",
            description="Any token of yours. A repetition under the same key within 24 hours is not done again but "
            "gets the first answer, marked `Idempotency-Replayed: true`; another request under the key is refused.",
            examples=["2b6f0cc9-04d6-4c1c-a4ba-7c7b6a6d0a36"],
        ),
    ] = None,
) -> None:
    """Hold the request's key, or raise: `Replayed` if it was answered, 422 if it belongs to another request, 409 if the
    first is still at work after `PATIENCE` seconds."""
    if idempotency_key is None:
        return
    transactions: anyio.CapacityLimiter = request.app.state.transactions
    request_sha256 = await fingerprint(request)
    principal = await authenticate(request)
    session = await transaction_of(request).session()
    claimed = Claim(session, principal.actor, idempotency_key, request_sha256)
    # Waiting must hold neither a thread nor a connection, or the waiting requests would starve the one they wait for.
    deadline = anyio.current_time() + PATIENCE
    while not await run_in_threadpool(_try_lock, claimed):
        if anyio.current_time() > deadline:
            raise Conflict(
                f"The first request under the Idempotency-Key {idempotency_key!r} is still being answered; retry.",
                headers={"Retry-After": "1"},
            )
        transactions.release_on_behalf_of(session)
        try:
            await anyio.sleep(PAUSE)
        finally:
            with anyio.CancelScope(shield=True):
                await transactions.acquire_on_behalf_of(session)
    request.state.idempotency = claimed
    before = await run_in_threadpool(_kept, claimed)
    if before is not None:
        raise Replayed(before)


def keep(claimed: Claim, *, response: Response, instead: BaseModel | None) -> None:
    """Add the answer to the request's transaction; `instead` takes the place of a body that holds a secret."""
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    claimed.session.add(
        IdempotencyKey(
            principal=claimed.principal,
            key=claimed.key,
            request_sha256=claimed.request_sha256,
            status=response.status_code,
            headers=headers,
            body=bytes(response.body) if instead is None else instead.model_dump_json().encode(),
        )
    )
    claimed.session.flush()


def keep_instead(request: Request, answer: BaseModel) -> None:
    """What a repetition is to be answered, where the first answer holds a secret that must not be stored."""
    request.state.idempotent_answer = answer


def forget(session: Session) -> int:
    """Delete the answers older than 24 hours; returns how many. For the sweeper."""
    expired = delete(IdempotencyKey).where(IdempotencyKey.created_at < func.now() - KEPT)
    return len(session.scalars(expired.returning(IdempotencyKey.key)).all())


def _try_lock(claimed: Claim) -> bool:
    name = hashlib.sha256(f"{claimed.principal}\n{claimed.key}".encode()).digest()
    lock = int.from_bytes(name[:8], "big", signed=True)
    held = claimed.session.scalar(text("SELECT pg_try_advisory_xact_lock(:lock)"), {"lock": lock})
    if not held:
        claimed.session.rollback()
    return bool(held)


def _kept(claimed: Claim) -> Response | None:
    here = (IdempotencyKey.principal == claimed.principal, IdempotencyKey.key == claimed.key)
    claimed.session.execute(delete(IdempotencyKey).where(*here, IdempotencyKey.created_at < func.now() - KEPT))
    row = claimed.session.scalars(select(IdempotencyKey).where(*here)).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != claimed.request_sha256:
        raise Unprocessable.at(
            "Idempotency-Key", "This key was used for another request; a new request needs a new key."
        )
    headers: dict[str, Any] = row.headers or {}
    return Response(row.body, status_code=row.status or 200, headers={**headers, "Idempotency-Replayed": "true"})
