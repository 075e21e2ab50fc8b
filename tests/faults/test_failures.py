"""Edits that cannot succeed: they fail with the reason, and nothing of them can be published."""

import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from safetensors.torch import load_file, save_file

from app.db.models import Edit, Job
from tests.app.checkpoints.conftest import register_folder
from tests.faults.conftest import Site, until

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def broken_folder(base_folder: Path, tmp_path: Path) -> Path:
    """A pipeline whose text encoder computes NaN from layer 3 on, as a half-written download might."""
    folder = tmp_path / "broken"
    shutil.copytree(base_folder, folder)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith("layers.3.mlp.fc2.weight")]
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_nan_loss_and_a_singular_second_moment_fail_their_jobs(
    site: Site, broken_folder: Path, outcome: Callable[..., None]
) -> None:
    with site.sessions() as session:
        register_folder(session, site.store, broken_folder, name="broken")
    body = {
        "source": "cat",
        "destination": {"prompt": "dog"},
        "settings": {"objective": "text", "optimization_steps": 5},
    }
    asked = site.ask("POST", "/v1/models/broken/edits", json=body)
    edit_id = UUID(asked.json()["id"])
    site.start_worker()

    def edit() -> Edit:
        with site.sessions() as session:
            return session.get_one(Edit, edit_id)

    until(lambda: edit().state in ("ready", "failed"), timeout=240)
    seen = site.ask("GET", f"/v1/edits/{edit_id}").json()
    assert (seen["state"], seen["problem"]["title"], seen["value"]) == ("failed", "Optimization diverged", None)
    assert site.ask("GET", f"/v1/edits/{edit_id}/value").status_code == 409
    for edits in ([str(edit_id)], "ready"):
        refused = site.ask("POST", "/v1/models/broken/apply", json={"edits": edits})
        assert refused.status_code in (409, 422), refused.text
    outcome(12, "a loss that turns NaN", note="failed with the reason; apply refuses it")

    site.ready_edit("fox")
    asked = site.ask("POST", "/v1/models/tiny/statistics", json={"captions": ["a red fox"]})
    assert asked.status_code == 202, asked.text
    until(lambda: site.ask("GET", asked.headers["Location"]).json()["state"] in ("ready", "failed"), timeout=240)
    assert site.ask("GET", asked.headers["Location"]).json()["state"] == "ready"
    made = site.await_version(site.apply(edits="ready", alias="production"))
    assert (made["state"], made["problem"]["title"], made["files"]) == ("failed", "Singular second moment", [])
    assert site.alias() is None
    assert site.ask("GET", f"/emender/tiny/resolve/{made['version']}/README.md").status_code == 404
    outcome(12, "a singular C0", note="failed with the reason; no alias, no file")


def test_a_payload_of_another_version_stays_queued(site: Site, outcome: Callable[..., None]) -> None:
    """A worker leaves a job that it does not know to those who do, and goes on with the others."""
    newer, known = (UUID(site.post_edit(source).json()["id"]) for source in ("newer", "known"))
    with site.sessions() as session:
        session.get_one(Job, site.job_table.latest_job(newer)).payload_version = 2
        session.commit()
    worker = site.start_worker()
    site.job_table.await_state(site.job_table.latest_job(known), "succeeded")
    worker.stop()
    job = site.job_table.job(site.job_table.latest_job(newer))
    assert (job.state, job.attempt) == ("queued", 0)
    outcome(22, "a job of an unknown payload version", note="refused: it stays queued; the job behind it is done")
