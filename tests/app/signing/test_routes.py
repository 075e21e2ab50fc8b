"""The public keys over HTTP: the current key and the earlier ones."""

from collections.abc import Mapping
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app.signing.keys import create_key
from app.signing.service import record_key
from tests.app.conftest import Headers


def test_the_key_used_last_is_current(
    client: TestClient, keys: Mapping[str, Headers], session: Session, tmp_path: Path
) -> None:
    """Also when an older key is used again."""
    read = keys["read"]
    assert client.get("/v1/signing-key", headers=read).status_code == 404
    older, newer = (create_key(tmp_path / f"{name}.pem") for name in ("older", "newer"))
    for key, others in ((older, []), (newer, [older.id]), (older, [newer.id])):
        record_key(session, key=key, actor="test")
        answer = client.get("/v1/signing-key", headers=read)
        assert (answer.status_code, answer.text) == (200, key.public_pem)
        assert answer.headers["Content-Type"].startswith("application/x-pem-file")
        listed = client.get("/v1/signing-keys", headers=read).json()
        assert [item["id"] for item in listed] == [key.id, *others]
    events = client.get("/v1/audit", params={"action": "signing_key.first_use"}, headers=keys["admin"]).json()["items"]
    assert [event["target"] for event in events] == [f"signing_key:{newer.id}", f"signing_key:{older.id}"]
