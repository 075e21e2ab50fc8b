import hashlib

import numpy
import pytest
from safetensors.numpy import load
from sqlalchemy import update

from app.db.models import Edit, EditValue


@pytest.fixture
def ready(client, keys, model, session):
    """The id of an edit with a value, δ and h."""
    body = {"source": "dog", "destination": {"prompt": "cat"}}
    edit_id = client.post("/v1/models/emoji/edits", headers=keys["edit"], json=body).json()["id"]
    delta = numpy.arange(64, dtype="<f4")
    hidden = numpy.ones(64, dtype="<f4")
    content = delta.tobytes(), hidden.tobytes()
    session.add(
        EditValue(
            edit_id=edit_id,
            encoder="text_encoder",
            layer=2,
            delta=content[0],
            hidden=content[1],
            sha256=hashlib.sha256(b"".join(content)).hexdigest(),
            losses={"text": [3.0, 1.5], "noise": [], "delta_norm": 2.0, "hidden_norm": 8.0},
            attempt=1,
            engine="1",
        )
    )
    session.execute(update(Edit).values(state="ready"))
    session.commit()
    return edit_id, delta, hidden


def test_vectors(client, keys, ready):
    edit_id, delta, hidden = ready
    answer = client.get(f"/v1/edits/{edit_id}/value", headers=keys["read"])
    assert answer.status_code == 200
    assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    tensors = load(answer.content)
    assert set(tensors) == {"text_encoder.delta", "text_encoder.hidden"}
    numpy.testing.assert_array_equal(tensors["text_encoder.delta"], delta)
    numpy.testing.assert_array_equal(tensors["text_encoder.hidden"], hidden)
    assert client.get(f"/v1/edits/{edit_id}/value", headers=keys["read"]).content == answer.content


def test_described_in_the_edit(client, keys, ready):
    edit_id, delta, hidden = ready
    (value,) = client.get(f"/v1/edits/{edit_id}", headers=keys["read"]).json()["values"]
    assert value["sha256"] == hashlib.sha256(delta.tobytes() + hidden.tobytes()).hexdigest()
    assert (value["text_loss"], value["noise_loss"], value["delta_norm"]) == (1.5, None, 2.0)


def test_not_ready(client, keys, ready, session):
    session.execute(update(Edit).values(state="optimizing"))
    session.commit()
    answer = client.get(f"/v1/edits/{ready[0]}/value", headers=keys["read"])
    assert answer.status_code == 409
    assert "optimizing" in answer.json()["detail"]


def test_damaged_vector_is_not_served(client, keys, ready, session):
    damaged = bytearray(ready[1].tobytes())
    damaged[5] ^= 1
    session.execute(update(EditValue).values(delta=bytes(damaged)))
    session.commit()
    answer = client.get(f"/v1/edits/{ready[0]}/value", headers=keys["read"])
    assert answer.status_code == 500
    assert "damaged" in answer.json()["detail"]
