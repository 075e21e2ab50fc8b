import base64
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.auth.service import create_key, find_principal
from app.db.models import ApiKey
from app.problems import Unprocessable


class TestFindPrincipal:
    @pytest.mark.parametrize(
        "token",
        ["", "em_", "em__", "em_unknown_secret", "Bearer", "em_\0_a", "em_ü_a", "hf_abc"],
    )
    def test_a_malformed_or_unknown_token_has_none(self, session: Session, token: str) -> None:
        assert find_principal(session, token=token) is None

    def test_a_token_with_another_secret_has_none(self, session: Session) -> None:
        _, token = create_key(session, name="a", scopes=["read"], actor="test")
        flipped = token[:-1] + ("A" if token[-1] != "A" else "B")
        assert find_principal(session, token=token) is not None
        assert find_principal(session, token=flipped) is None

    def test_last_use_is_recorded_at_most_once_a_minute(self, session: Session) -> None:
        key, token = create_key(session, name="a", scopes=["read"], actor="test")

        def last_used() -> Any:
            return session.scalar(select(ApiKey.last_used_at).where(ApiKey.id == key.id))

        def set_back(seconds: Any) -> Any:
            earlier = session.scalar(select(func.now() - timedelta(seconds=seconds)))
            session.execute(update(ApiKey).where(ApiKey.id == key.id).values(last_used_at=earlier))
            return earlier

        find_principal(session, token=token)
        assert last_used() is not None
        recent = set_back(30)
        find_principal(session, token=token)
        assert last_used() == recent
        old = set_back(90)
        find_principal(session, token=token)
        assert last_used() > old


class TestCreateKey:
    def test_scopes_must_be_known_and_at_least_one(self, session: Session) -> None:
        with pytest.raises(Unprocessable, match="at least one scope"):
            create_key(session, name="a", scopes=[], actor="test")
        with pytest.raises(Unprocessable, match="no scope 'root'"):
            create_key(session, name="a", scopes=["root"], actor="test")


class TestExpiry:
    def test_an_expired_key_is_refused(self, session: Session) -> None:
        soon = datetime.now(UTC) + timedelta(hours=1)
        key, token = create_key(session, name="a", scopes=["read"], actor="test", expires_at=soon)
        assert find_principal(session, token=token) is not None
        session.execute(update(ApiKey).where(ApiKey.id == key.id).values(expires_at=func.now()))
        session.expire_all()
        assert find_principal(session, token=token) is None

    def test_a_key_cannot_be_created_expired(self, session: Session) -> None:
        with pytest.raises(Unprocessable, match="in the past"):
            create_key(session, name="a", scopes=["read"], actor="test", expires_at=datetime.now(UTC))


def test_a_secret_has_256_bits_and_is_stored_as_its_sha256(session: Session) -> None:
    key, token = create_key(session, name="a", scopes=["read"], actor="test")
    prefix, secret = token.removeprefix("em_").split("_", 1)
    assert prefix == key.prefix
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    row = session.get_one(ApiKey, key.id)
    assert row.secret_sha256 == hashlib.sha256(secret.encode()).digest()
