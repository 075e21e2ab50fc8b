"""Browser sessions of the admin pages. The browser has a random token; the database has its sha256 and the key's id.

The cookie never has the key. A session ends with its key: requests are refused once that is revoked or expired.
"""

import hashlib
import secrets
from datetime import timedelta
from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app.auth.service import IS_VALID, Principal
from app.db.models import ApiKey, BrowserSession

LIFETIME = timedelta(hours=12)


def begin_session(session: Session, *, key_id: UUID) -> str:
    """Create a session of the key and return its token. Deletes all expired sessions."""
    token = secrets.token_urlsafe(32)
    session.execute(delete(BrowserSession).where(BrowserSession.expires_at <= func.now()))
    expires_at = session.scalars(select(func.now() + LIFETIME)).one()
    session.add(BrowserSession(token_sha256=_digest(token), key_id=key_id, expires_at=expires_at))
    session.flush()
    return token


def find_principal(session: Session, *, token: str) -> Principal | None:
    """Return the principal of a session, unless it or its key is unknown or expired."""
    query = (
        select(ApiKey)
        .join(BrowserSession, BrowserSession.key_id == ApiKey.id)
        .where(BrowserSession.token_sha256 == _digest(token), BrowserSession.expires_at > func.now(), IS_VALID)
    )
    key = session.scalars(query).one_or_none()
    return Principal(key.id, f"key:{key.prefix}", key.name, frozenset(key.scopes)) if key else None


def end_session(session: Session, *, token: str) -> None:
    """Delete a session, if there is one with this token."""
    session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == _digest(token)))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
