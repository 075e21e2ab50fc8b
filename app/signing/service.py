"""The public halves of the keys that versions were signed with: noted by who signs, read by who verifies."""

from sqlalchemy import Select, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import SigningKey
from app.problems import NotFound
from app.signing import keys
from emender.schemas.signing import SigningKeyOut


class NothingSigned(NotFound):
    title = "Nothing signed"

    def __init__(self) -> None:
        super().__init__("No version was signed yet; `emender signing-key show` prints the key where its file is.")


def note_key(session: Session, *, key: keys.SigningKey, actor: str) -> None:
    """Keep the public key, as the one that is in use. The first time, the audit log says so."""
    now = func.clock_timestamp()
    row = {"id": key.id, "public_key": key.public_pem, "created_at": now, "last_used_at": now}
    added = session.scalars(
        insert(SigningKey).values(row).on_conflict_do_nothing().returning(SigningKey.id)
    ).one_or_none()
    if added is None:
        session.get_one(SigningKey, key.id, with_for_update=True).last_used_at = now
    else:
        record(session, actor=actor, action="signing_key.first_use", target=f"signing_key:{key.id}", details={})
    session.flush()


def current_key(session: Session) -> SigningKeyOut:
    """The key used last. Raises `NothingSigned`."""
    row = session.scalars(_latest().limit(1)).one_or_none()
    if row is None:
        raise NothingSigned
    return SigningKeyOut.model_validate(row)


def list_keys(session: Session) -> list[SigningKeyOut]:
    """Every key that a version was ever signed with, the one used last first."""
    return [SigningKeyOut.model_validate(row) for row in session.scalars(_latest())]


def _latest() -> Select[SigningKey]:
    return select(SigningKey).order_by(SigningKey.last_used_at.desc(), SigningKey.id)
