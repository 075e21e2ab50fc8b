"""Edits that are ready with values of their own, and a whole service on a small real pipeline."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlalchemy.orm import Session

import editing
from app.checkpoints.publish import publish
from app.db.engine import Sessions, sessions
from app.db.models import Checkpoint, CheckpointEdit, Edit, EditValue, Model, ModelFile, Statistics
from app.main import create_app
from app.settings import Settings
from app.signing.keys import create_key
from app.storage import open_store
from app.storage.store import Store
from app.worker.runner import Runner
from editing.files import File
from editing.values import EncoderValue
from tests.app.conftest import Headers, issue_keys
from tests.pipelines import LAYERS, write_pipeline
from tests.servers import S3Server

CAPTIONS = [
    f"a {color} {thing}" for color in ("red", "blue", "pale", "dark") for thing in ("fox", "oak", "jug", "wasp")
]


def ready_edit(
    session: Session, model: Model, source: str, *, width: int, layer: int, state: str = "ready", **columns: Any
) -> Edit:
    """An edit and, if it is ready, the value that stage I would have found: drawn from the source's name."""
    given = {"destination": {"prompt": f"not {source}"}, "templates": ["a photo of {}", "{}"], "settings": {}}
    edit = Edit(model_id=model.id, source=source, state=state, created_by="test", **(given | columns))
    if state == "ready":
        edit.value = drawn_value(source, width=width, layer=layer)
    session.add(edit)
    session.commit()
    return edit


def drawn_value(source: str, *, width: int, layer: int) -> EditValue:
    seed = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big")
    delta, hidden = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, width)).astype("<f4"))
    content = editing.EditValue({"text_encoder": EncoderValue(layer, delta, hidden)}).to_safetensors()
    return EditValue(
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        encoders=[{"name": "text_encoder", "layer": layer, "delta_norm": 1.0, "hidden_norm": 1.0}],
        losses={},
        attempt=1,
        engine=editing.ENGINE_VERSION,
    )


def add_version(
    session: Session,
    model: Model,
    statistics: Statistics,
    number: int,
    *,
    edits: Sequence[Edit],
    state: str = "published",
    files: Sequence[File] = (),
) -> Checkpoint:
    """A version with these files of its own, published by the worker's own hand unless it is in another state."""
    checkpoint = Checkpoint(
        model_id=model.id,
        number=number,
        statistics_id=statistics.id,
        alpha=0.5,
        layers=[0, 1, 2],
        options={"residual_schedule": "spread", "moment_weight": 4000.0, "preserve": []},
        created_by="test",
    )
    checkpoint.edits = [CheckpointEdit(position=i, edit_id=edit.id) for i, edit in enumerate(edits)]
    session.add(checkpoint)
    session.flush()
    if state == "published":
        publish(session, checkpoint=checkpoint, files=files, report={})
    else:
        checkpoint.state = state
    session.commit()
    return checkpoint


@pytest.fixture
def add_edit(session: Session, model: Model) -> Callable[..., Edit]:
    """Add an edit of `model`, ready unless said otherwise."""

    def add(source: str, **columns: Any) -> Edit:
        return ready_edit(
            session, columns.pop("model", model), source, width=64, layer=columns.pop("layer", 2), **columns
        )

    return add


@pytest.fixture
def statistics(session: Session, model: Model) -> Statistics:
    row = Statistics(model_id=model.id, state="ready", captions_name="test", digest="c" * 64, created_by="test")
    session.add(row)
    session.commit()
    return row


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real pipeline, and the second moments of its keys."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")
    encoder = editing.load_pipeline(folder).encoder
    editing.estimate_second_moments(encoder, CAPTIONS).save(folder / "second_moments.safetensors")
    return folder


@dataclass
class Service:
    """The application and a worker on a database that commits."""

    client: TestClient
    keys: Mapping[str, Headers]
    sessions: Sessions
    store: Store
    settings: Settings
    runner: Runner
    model: Model

    def edit(self, source: str, **columns: Any) -> UUID:
        with self.sessions() as session:
            edit = ready_edit(session, self.model, source, width=32, layer=LAYERS - 2, **columns)
            return edit.id

    def apply(self, **body: Any) -> dict[str, Any]:
        """Ask for a checkpoint, let the worker build it, and read it."""
        asked = self.client.post(f"/v1/models/{self.model.name}/apply", json=body, headers=self.keys["apply"])
        assert asked.status_code == 202, asked.text
        while self.runner.work():
            pass
        made: dict[str, Any] = self.get(asked.headers["Location"])
        return made

    def get(self, path: str) -> Any:
        answer = self.client.get(path, headers=self.keys["read"])
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def service(settings: Settings, clean_database: Engine, base_folder: Path) -> Iterator[Service]:
    with serving(settings, clean_database, base_folder) as service:
        yield service


@pytest.fixture
def s3_service(settings: Settings, s3_server: S3Server, clean_database: Engine, base_folder: Path) -> Iterator[Service]:
    """The same with its blobs in a bucket, to which clients are sent for all files of 1000 bytes and more."""
    given = s3_server.settings(settings.data_dir, database_url=settings.database_url, presigned_min_bytes=1000)
    with serving(Settings(**given), clean_database, base_folder) as service:
        yield service


@contextmanager
def serving(settings: Settings, clean_database: Engine, base_folder: Path) -> Iterator[Service]:
    store = open_store(settings)
    factory = sessions(clean_database)
    with factory() as session:
        keys = issue_keys(session)
        model = register_folder(session, store, base_folder)
    stopping = threading.Event()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    signing_key_file = settings.data_dir / "signing-key.pem"
    create_key(signing_key_file)
    update = {"torch_threads": 1, "device": "cpu", "signing_key_file": signing_key_file}
    settings = settings.model_copy(update=update)
    runner = Runner(settings=settings, sessions=factory, store=store, worker="test", stopping=stopping)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield Service(client, keys, factory, store, settings, runner, model)


def register_folder(session: Session, store: Store, folder: Path, *, name: str = "tiny") -> Model:
    """What the worker leaves of a registration."""
    description = editing.describe_pipeline(folder)
    model = Model(
        name=name,
        namespace="emender",
        source=name,
        state="ready",
        family=description.family,
        digest=description.digest,
        encoders=[
            {"name": encoder.name, "layers": encoder.layers, "width": encoder.width, "mlp_width": encoder.mlp_width}
            for encoder in description.encoders
        ],
        created_by="test",
    )
    for file in description.files:
        model.files.append(ModelFile(path=file.path, sha256=store.put_file(folder / file.path), size=file.size))
    session.add(model)
    session.flush()
    digest = store.put_file(folder / "second_moments.safetensors")
    session.add(Statistics(model_id=model.id, state="ready", captions_name="test", digest=digest, created_by="test"))
    session.commit()
    return model
