"""Find the references to blobs; every column that looks like a hash is classified."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app.db.models import Base, Checkpoint, CheckpointFile, Edit, Evaluation, Image, Model, ModelFile, Statistics
from app.storage.references import find_referenced, list_references

BLOB_COLUMNS = {
    "model_files.sha256",
    "checkpoint_files.sha256",
    "statistics.captions_sha256",
    "statistics.digest",
    "images.sha256",
    "evaluations.files",
    "edits.destination",
}
"""Columns that name blobs, as `table.column`. `_select_references` has a query for each of them."""

OTHER_HASH_COLUMNS = {
    "api_keys.secret_sha256",
    "base_models.digest",
    "browser_sessions.token_sha256",
    "edit_values.sha256",
    "idempotency_keys.request_sha256",
    "audit_events.previous_hash",
    "audit_events.hash",
}
"""Columns of hashes that name no blob."""

LIKE_A_HASH = re.compile(r"sha\d|digest|hash|blob|checksum|files")


def sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture
def add(session: Session) -> Callable[..., Any]:
    def add(row: Any) -> Any:
        session.add(row)
        session.flush()
        return row

    return add


@pytest.fixture
def version(add: Callable[..., Any]) -> Checkpoint:
    """A checkpoint, and one row of each kind that names a blob."""
    model = add(Model(name="emoji", namespace="emender", source="emoji", digest=sha256("of files"), created_by="test"))
    given = {"model_id": model.id, "created_by": "test"}
    add(ModelFile(model_id=model.id, path="unet/config.json", sha256=sha256("base"), size=1))
    add(Statistics(captions_name="test", captions_sha256=sha256("captions"), digest=sha256("moments"), **given))
    add(Statistics(captions_name="shipped", **given))
    add(Image(sha256=sha256("image"), width=1, height=1, size=1, created_by="test"))
    images = {"images": [f"sha256:{sha256('picture')}"]}
    for destination in (images, {"prompt": "robot"}):
        add(Edit(source="dog", destination=destination, templates=["{}"], settings={}, **given))
    checkpoint = add(Checkpoint(number=1, state="published", layers=[], options={}, **given))
    add(CheckpointFile(checkpoint_id=checkpoint.id, path="README.md", sha256=sha256("card"), size=1))
    files = [{"path": "report.md", "sha256": sha256("report"), "size": 1}]
    evaluation = {"kind": "evaluation", "request": {}, "created_by": "test"}
    add(Evaluation(checkpoint_id=checkpoint.id, files=files, **evaluation))
    add(Evaluation(checkpoint_id=checkpoint.id, **evaluation))
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


NAMES = ("base", "captions", "moments", "image", "picture", "card", "report")


def test_every_hash_column_is_classified() -> None:
    """A new column of hashes must be added to one of the sets above, and to the query if it names blobs."""
    columns = {f"{table.name}.{column.name}" for table in Base.metadata.sorted_tables for column in table.columns}
    assert BLOB_COLUMNS | OTHER_HASH_COLUMNS <= columns
    assert {name for name in columns if LIKE_A_HASH.search(name.partition(".")[2])} <= BLOB_COLUMNS | OTHER_HASH_COLUMNS


@pytest.mark.usefixtures("version")
def test_every_reference_is_found(session: Session) -> None:
    places = list_references(session)
    assert places.keys() == {sha256(name) for name in NAMES} and len(NAMES) == len(BLOB_COLUMNS)
    assert places[sha256("base")] == ["model:emoji/unet/config.json"]
    assert places[sha256("card")] == ["checkpoint:emoji/v1/README.md"]
    assert places[sha256("report")][0].endswith("/report.md")
    asked = {sha256(name) for name in ("base", "report", "nothing")}
    assert find_referenced(session, among=asked) == asked - {sha256("nothing")}
    assert find_referenced(session, among=[]) == set()


def test_retracted_checkpoints_can_be_left_out(session: Session, version: Checkpoint) -> None:
    version.state = "retracted"
    session.flush()
    assert find_referenced(session, among=[sha256("card")]) == {sha256("card")}
    kept = list_references(session, retracted=False)
    assert kept.keys() == {sha256(name) for name in NAMES if name != "card"}
