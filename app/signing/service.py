"""Record the public keys that checkpoints were signed with, and list them."""

from sqlalchemy import Select, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import SigningKey
from app.problems import NotFound
from app.signing import keys
from emender.schemas.signing import SigningKeyOut


class NoSigningKey(NotFound):
    def __init__(self) -> None:
        super().__init__(
            "No checkpoint was signed yet. On the worker's machine, `emender signing-key show` prints its public key."
        )


def record_key(session: Session, *, key: keys.SigningKey, actor: str) -> None:
    """Store the public key as the one used last. Its first use is an audit event."""
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


def get_current_key(session: Session) -> SigningKeyOut:
    """Return the key used last. Raises `NoSigningKey`."""
    row = session.scalars(_latest_first().limit(1)).one_or_none()
    if row is None:
        raise NoSigningKey
    return SigningKeyOut.model_validate(row)


def list_keys(session: Session) -> list[SigningKeyOut]:
    """List every key that a checkpoint was signed with, the one used last first."""
    return [SigningKeyOut.model_validate(row) for row in session.scalars(_latest_first())]


def _latest_first() -> Select[SigningKey]:
    return select(SigningKey).order_by(SigningKey.last_used_at.desc(), SigningKey.id)
