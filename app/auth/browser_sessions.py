"""Who signed in to the pages. A browser holds a random token; the database its sha256, beside the key's id.

The key itself is in no cookie, and a session ends with its key: one that is revoked or has expired is refused at once.
"""

import hashlib
import secrets
from datetime import timedelta
from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app.auth.service import VALID
from app.db.models import ApiKey, BrowserSession
from emender.schemas.keys import ApiKeyOut

LIFETIME = timedelta(hours=12)


def begin(session: Session, *, key_id: UUID) -> str:
    """The token of a new session of this key. Those that have expired, of whatever key, are deleted."""
    token = secrets.token_urlsafe(32)
    session.execute(delete(BrowserSession).where(BrowserSession.expires_at <= func.now()))
    expires_at = session.scalars(select(func.now() + LIFETIME)).one()
    session.add(BrowserSession(token_sha256=_digest(token), key_id=key_id, expires_at=expires_at))
    session.flush()
    return token


def find_key(session: Session, *, token: str) -> ApiKeyOut | None:
    """The key that this session was begun with; None if it is unknown or expired, or the key no longer valid."""
    query = (
        select(ApiKey)
        .join(BrowserSession, BrowserSession.key_id == ApiKey.id)
        .where(BrowserSession.token_sha256 == _digest(token), BrowserSession.expires_at > func.now())
        .where(VALID)
    )
    key = session.scalars(query).one_or_none()
    return ApiKeyOut.model_validate(key) if key else None


def end(session: Session, *, token: str) -> None:
    """From now on the session is refused; one that is unknown is no error."""
    session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == _digest(token)))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
