"""API keys. A token is `em_<prefix>_<secret>`; the database holds the prefix and the secret's sha256.

A plain sha256 is enough, since the secret is 256 random bits: there is nothing to guess that a slow hash would protect.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import get_args
from uuid import UUID

from sqlalchemy import ARRAY, String, and_, any_, func, literal, or_, select, update
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import ApiKey
from app.db.pagination import PageCursor
from app.problems import NotFound, Unprocessable
from emender.schemas.common import Page
from emender.schemas.keys import ApiKeyOut, Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)
MARK = "em_"


class ApiKeyNotFound(NotFound):
    title = "API key not found"

    def __init__(self, key_id: UUID) -> None:
        super().__init__(f"There is no API key {key_id}.")


VALID = and_(ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()))
"""That a key was not revoked and has not expired, by the database's clock."""


def create_key(
    session: Session, *, name: str, scopes: Sequence[str], actor: str, expires_at: datetime | None = None
) -> tuple[ApiKeyOut, str]:
    """A new key and its token, which is never to be had again.

    Raises `Unprocessable` for an unknown scope, and for an end that has passed.
    """
    for index, scope in enumerate(scopes):
        if scope not in SCOPES:
            raise Unprocessable.at(f"/scopes/{index}", f"There is no scope {scope!r}; there are {', '.join(SCOPES)}.")
    if not scopes:
        raise Unprocessable.at("/scopes", "A key needs at least one scope.")
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise Unprocessable.at("/expires_at", "This moment has passed; a key expires later, or never.")
    prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    ordered = [scope for scope in SCOPES if scope in scopes]
    key = ApiKey(name=name, prefix=prefix, secret_sha256=_digest(secret), scopes=ordered, expires_at=expires_at)
    session.add(key)
    session.flush()
    record(
        session,
        actor=actor,
        action="key.create",
        target=f"key:{prefix}",
        details={"name": name, "scopes": ordered},
        after={"revoked": False, "expires_at": expires_at.isoformat() if expires_at else None},
    )
    return ApiKeyOut.model_validate(key), f"{MARK}{prefix}_{secret}"


def authenticate(session: Session, *, tokens: Sequence[str]) -> list[ApiKeyOut | None]:
    """The key of each token; None if it is malformed, unknown, revoked or expired. Notes the use of a key at most once
    a minute.

    Expiry is by the database's clock. All are looked up by one statement.
    """
    parts = [_parts(token) for token in tokens]
    unnoted = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < func.now() - timedelta(minutes=1))
    prefixes = list({prefix for prefix, _ in filter(None, parts)})
    query = select(ApiKey, unnoted, VALID).where(ApiKey.prefix == any_(literal(prefixes, ARRAY(String))))
    rows = {key.prefix: (key, due, valid) for key, due, valid in session.execute(query)} if prefixes else {}
    found: list[ApiKeyOut | None] = []
    due_ids = set()
    for part in parts:
        key, due, valid = rows.get(part[0], (None, False, False)) if part else (None, False, False)
        expected = key.secret_sha256 if key else bytes(32)
        if part is None or not hmac.compare_digest(_digest(part[1]), expected) or key is None or not valid:
            found.append(None)
            continue
        if due:
            due_ids.add(key.id)
        found.append(ApiKeyOut.model_validate(key))
    if due_ids:
        session.execute(update(ApiKey).where(ApiKey.id.in_(due_ids), unnoted).values(last_used_at=func.now()))
    return found


def list_keys(session: Session, *, page: PageCursor[UUID]) -> Page[ApiKeyOut]:
    rows, next_cursor = page.fetch(session, select(ApiKey), ApiKey.id)
    return Page(items=[ApiKeyOut.model_validate(row) for row in rows], next=next_cursor)


def get_key(session: Session, *, key_id: UUID) -> ApiKeyOut:
    key = session.get(ApiKey, key_id)
    if key is None:
        raise ApiKeyNotFound(key_id)
    return ApiKeyOut.model_validate(key)


def revoke_key(session: Session, *, key_id: UUID, actor: str) -> None:
    """From now on the key is refused. Its row stays, since the audit log names it; revoking twice changes nothing."""
    key = session.get(ApiKey, key_id, with_for_update=True)
    if key is None:
        raise ApiKeyNotFound(key_id)
    if key.revoked_at is None:
        key.revoked_at = session.scalar(select(func.now()))
        record(
            session,
            actor=actor,
            action="key.revoke",
            target=f"key:{key.prefix}",
            details={"name": key.name},
            before={"revoked": False},
            after={"revoked": True},
        )


def _parts(token: str) -> tuple[str, str] | None:
    """Prefix and secret of a token; None for what is no token of ours."""
    if not token.startswith(MARK) or not token.isascii() or "\0" in token:
        return None
    prefix, _, secret = token.removeprefix(MARK).partition("_")
    return prefix, secret


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
