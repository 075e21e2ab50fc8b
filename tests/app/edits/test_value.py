import hashlib
from collections.abc import Mapping

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.numpy import load
from sqlalchemy import update
from sqlalchemy.orm import Session

import editing
from app.db.models import Edit, EditValue, Model
from editing.values import EncoderValue
from tests.app.conftest import Headers


@pytest.fixture
def edit_id(client: TestClient, keys: Mapping[str, Headers], model: Model) -> str:
    body = {"source": "dog", "destination": {"prompt": "cat"}}
    return str(client.post("/v1/models/emoji/edits", headers=keys["edit"], json=body).json()["id"])


@pytest.fixture
def content(edit_id: str, session: Session) -> bytes:
    """The value of the edit, as the worker stores it."""
    value = EncoderValue(2, delta=torch.arange(64.0), hidden=torch.ones(64))
    content = editing.EditValue({"text_encoder": value}).to_safetensors()
    session.add(
        EditValue(
            edit_id=edit_id,
            content=content,
            sha256=hashlib.sha256(content).hexdigest(),
            encoders=[{"name": "text_encoder", "layer": 2, "delta_norm": 2.0, "hidden_norm": 8.0}],
            losses={"text": [3.0, 1.5], "noise": []},
            attempt=1,
            engine="1",
        )
    )
    session.execute(update(Edit).values(state="ready"))
    session.commit()
    return content


def test_the_stored_file_is_served_unchanged(
    client: TestClient, keys: Mapping[str, Headers], edit_id: str, content: bytes
) -> None:
    answer = client.get(f"/v1/edits/{edit_id}/value", headers=keys["read"])
    assert answer.status_code == 200
    assert answer.content == content
    assert answer.headers["ETag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    tensors = load(answer.content)
    assert set(tensors) == {"text_encoder.delta", "text_encoder.hidden"}
    assert tensors["text_encoder.delta"].tolist() == list(range(64))
    assert tensors["text_encoder.hidden"].tolist() == [1.0] * 64


def test_an_edit_describes_its_value(
    client: TestClient, keys: Mapping[str, Headers], edit_id: str, content: bytes
) -> None:
    value = client.get(f"/v1/edits/{edit_id}", headers=keys["read"]).json()["value"]
    assert value["sha256"] == hashlib.sha256(content).hexdigest()
    assert (value["text_loss"], value["noise_loss"]) == (1.5, None)
    assert value["encoders"] == [{"name": "text_encoder", "layer": 2, "delta_norm": 2.0, "hidden_norm": 8.0}]


def test_an_edit_without_a_value_describes_none(client: TestClient, keys: Mapping[str, Headers], edit_id: str) -> None:
    assert client.get(f"/v1/edits/{edit_id}", headers=keys["read"]).json()["value"] is None


@pytest.mark.usefixtures("content")
def test_the_value_of_an_unfinished_edit_is_a_conflict(
    client: TestClient, keys: Mapping[str, Headers], edit_id: str, session: Session
) -> None:
    session.execute(update(Edit).values(state="optimizing"))
    session.commit()
    answer = client.get(f"/v1/edits/{edit_id}/value", headers=keys["read"])
    assert answer.status_code == 409
    assert "optimizing" in answer.json()["detail"]


def test_a_damaged_value_is_not_served(
    client: TestClient, keys: Mapping[str, Headers], edit_id: str, content: bytes, session: Session
) -> None:
    damaged = bytearray(content)
    damaged[-5] ^= 1
    session.execute(update(EditValue).values(content=bytes(damaged)))
    session.commit()
    answer = client.get(f"/v1/edits/{edit_id}/value", headers=keys["read"])
    assert answer.status_code == 500
    assert "damaged" in answer.json()["detail"]
