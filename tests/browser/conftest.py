"""A served service with a worker, one for all tests of the browser, and the browser."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from app.checkpoints.files import store_content
from app.db.models import EditValue, Evaluation, Job
from app.local.supervisor import Stack
from app.main import create_app
from app.settings import Settings
from app.storage.local import LocalStore
from tests.app.checkpoints.conftest import base_folder, register_folder
from tests.app.conftest import issue_keys
from tests.conftest import emptied
from tests.seeded import seed
from tests.servers import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["base_folder"]

HOSTILE = "<script>document.title = 'run'</script>" + "unbroken" * 20


@dataclass(frozen=True)
class Site:
    url: str
    key: str
    pages: Mapping[str, str]
    """Pages of the model `emoji`, whose texts are hostile. The model `tiny` has no edits yet, and can be edited."""


@pytest.fixture(scope="module")
def site(
    engine: Engine, database_url: str, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    settings = Settings(
        data_dir=folder / "var",
        database_url=SecretStr(database_url),
        webhook_secret_key=SecretStr("k" * 40),
        signing_key_file="none",
        port=free_port(),
        poll_interval_seconds=0.1,
        torch_threads=1,
        device="cpu",
    )
    store = LocalStore(settings.store_dir)
    with emptied(engine):
        with TestClient(create_app(settings)) as client, Session(engine, expire_on_commit=False) as session:
            keys = issue_keys(session)
            seeded = seed(session, client, keys, store=store, folder=folder / "tokenizer")
            Image.linear_gradient("L").save(folder / "grid.png")
            file = store_content(store, "before-after.png", (folder / "grid.png").read_bytes())
            files = [asdict(file)]
            session.execute(update(Evaluation).values(state="ready", files=files, report={"prompts": [HOSTILE]}))
            losses = {"text": [1.5, 0.2, 0.0007], "noise": [0.3, 0.2, 0.1]}
            session.execute(update(EditValue).values(losses=losses))
            session.execute(update(Job).where(Job.state == "queued").values(state="succeeded"))  # not for the worker
            edit = seeded.edits["ready"]
            edit.source, edit.reason = HOSTILE, HOSTILE
            register_folder(session, store, base_folder)
        versions = "models/emoji/checkpoints"
        pages = {
            "hostile-edits": "models/emoji/edits",
            "hostile-edit": f"edits/{edit.id}",
            "hostile-versions": versions,
            "hostile-version": f"{versions}/v1",
            "hostile-difference": f"{versions}/v2/difference?against=v1",
            "hostile-evaluation": f"{versions}/v1/evaluations/{seeded.parameters['evaluation_id']}",
            "hostile-audit": "audit",
            "nothing": "nothing",
        }
        key = keys["admin"]["Authorization"].removeprefix("Bearer ")
        with Stack(settings, embedded=False) as stack:
            yield Site(f"{stack.url}/admin", key, pages)


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    executable = os.environ.get("EMENDER_TEST_CHROMIUM") or shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no chromium on the PATH; EMENDER_TEST_CHROMIUM names one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
