"""Tests that use `store` run on a folder and on a bucket of a real S3 server."""

from collections.abc import Callable
from pathlib import Path

import obstore
import pytest

from app.settings import Settings
from app.storage import open_store
from app.storage.local import LocalStore
from app.storage.s3 import S3Store
from app.storage.store import Store, blob_key

Damage = Callable[[str, bytes], None]


@pytest.fixture(params=["local", "s3"])
def store_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "local":
        return Settings(data_dir=tmp_path)
    return Settings(**request.getfixturevalue("s3_server").settings(tmp_path))


@pytest.fixture
def store(store_settings: Settings) -> Store:
    return open_store(store_settings)


@pytest.fixture
def damage(store: Store) -> Damage:
    """Replace the bytes of a blob without the store."""

    def write(sha256: str, content: bytes) -> None:
        if isinstance(store, S3Store):
            obstore.put(store._bucket, blob_key(sha256), content)
        else:
            assert isinstance(store, LocalStore)
            store.path(sha256).write_bytes(content)

    return write
