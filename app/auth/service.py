"""API keys. A token is `em_<prefix>_<secret>`; the database has the prefix and the sha256 of the secret.

A plain sha256 is enough: the secret has 256 random bits, which a slow hash would not protect better.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import get_args
from uuid import UUID

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import ApiKey
from app.db.pagination import PageCursor
from app.problems import Forbidden, NotFound, Unprocessable
from emender.schemas.common import Page
from emender.schemas.keys import ApiKeyOut, Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)
TOKEN = re.compile(r"em_([0-9a-f]{12})_(.+)", re.ASCII | re.DOTALL)
IS_VALID = and_(ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()))
"""Whether a key is neither revoked nor expired, by the database's clock."""
USED_RECENTLY = ApiKey.last_used_at > func.now() - timedelta(minutes=1)


class ScopeMissing(Forbidden):
    title = Forbidden.title

    def __init__(self, principal: "Principal", scope: Scope) -> None:
        super().__init__(f"This needs the scope {scope!r}; the key has {', '.join(sorted(principal.scopes))}.")


class ApiKeyNotFound(NotFound):
    title = "API key not found"


@dataclass(frozen=True)
class Principal:
    """The API key behind a request. Rows and audit events name it by `actor`: `key:<prefix>`."""

    key_id: UUID
    actor: str
    name: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Whether the key has the scope; `admin` includes the others."""
        return scope in self.scopes or "admin" in self.scopes


def create_key(
    session: Session, *, name: str, scopes: Sequence[str], actor: str, expires_at: datetime | None = None
) -> tuple[ApiKeyOut, str]:
    """Create a key. Return it and its token, which cannot be read again.

    Raises `Unprocessable` for an unknown scope or a past `expires_at`.
    """
    for index, scope in enumerate(scopes):
        if scope not in SCOPES:
            raise Unprocessable.at(f"/scopes/{index}", f"There is no scope {scope!r}; there are {', '.join(SCOPES)}.")
    if not scopes:
        raise Unprocessable.at("/scopes", "A key needs at least one scope.")
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise Unprocessable.at("/expires_at", "This time is in the past; give a later one, or none.")
    prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    ordered = [scope for scope in SCOPES if scope in scopes]
    digest = hashlib.sha256(secret.encode()).digest()
    key = ApiKey(name=name, prefix=prefix, secret_sha256=digest, scopes=ordered, expires_at=expires_at)
    session.add(key)
    session.flush()
    details = {"name": name, "scopes": ordered}
    after = {"revoked": False, "expires_at": expires_at.isoformat() if expires_at else None}
    record(session, actor=actor, action="key.create", target=f"key:{prefix}", details=details, after=after)
    return ApiKeyOut.model_validate(key), f"em_{prefix}_{secret}"


def find_principal(session: Session, *, token: str) -> Principal | None:
    """Return the principal of a valid token. Sets `last_used_at` of its key, at most once a minute."""
    found = TOKEN.fullmatch(token)
    if found is None:
        return None
    query = select(ApiKey, USED_RECENTLY).where(ApiKey.prefix == found[1], IS_VALID)
    key, used_recently = session.execute(query).one_or_none() or (None, None)
    secret_sha256 = key.secret_sha256 if key else bytes(32)  # an unknown key takes as long as a wrong secret
    if not hmac.compare_digest(hashlib.sha256(found[2].encode()).digest(), secret_sha256) or key is None:
        return None
    if not used_recently:
        key.last_used_at = func.now()
    return Principal(key.id, f"key:{key.prefix}", key.name, frozenset(key.scopes))


def list_keys(session: Session, *, page: PageCursor[UUID]) -> Page[ApiKeyOut]:
    """List all keys, newest first."""
    rows, next_cursor = page.fetch(session, select(ApiKey), ApiKey.id)
    return Page(items=[ApiKeyOut.model_validate(row) for row in rows], next=next_cursor)


def get_key(session: Session, *, key_id: UUID) -> ApiKeyOut:
    return ApiKeyOut.model_validate(_find_key(session, key_id=key_id))


def revoke_key(session: Session, *, key_id: UUID, actor: str) -> None:
    """Revoke a key. Its row stays, because the audit log names it. Revoking it again changes nothing."""
    key = _find_key(session, key_id=key_id, lock=True)
    if key.revoked_at is None:
        key.revoked_at = session.scalar(select(func.now()))
        target, details = f"key:{key.prefix}", {"name": key.name}
        before, after = {"revoked": False}, {"revoked": True}
        record(session, actor=actor, action="key.revoke", target=target, details=details, before=before, after=after)


def _find_key(session: Session, *, key_id: UUID, lock: bool = False) -> ApiKey:
    key = session.get(ApiKey, key_id, with_for_update=lock)
    if key is None:
        raise ApiKeyNotFound(f"There is no API key {key_id}.")
    return key
