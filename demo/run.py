"""From edits to a pulled checkpoint: `make demo`.

It starts the embedded service in a folder of its own, registers the emoji model, creates the edits over HTTP, applies
them and pulls the checkpoint. It draws the same prompts with the same seeds with the base model and with the pulled
one, and writes `before-after.png` and `report.json`.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import httpx2
import huggingface_hub
import transformers
from diffusers import StableDiffusionPipeline
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from app.local.child_process import die_with_parent
from demo.classify import load_classifier
from demo.concepts import WEIGHTS, read_concepts
from demo.draw import draw_pictures, load_pipeline
from demo.edits import EDITS, REFERENCE_PROMPT, REFERENCE_SEEDS, DemoEdit, held_out
from demo.memory import PeakMemory
from demo.results import (
    PipelinePictures,
    as_images,
    draw_results,
    picture_count,
    print_figures,
    report_of,
    save_picture,
)
from emender import Client, EmenderError, WorkFailed
from emender.schemas.checkpoints import CheckpointOut
from emender.schemas.edits import EditOut

Json = dict[str, Any]

MODEL = "emoji"
SOURCE = "pipeline"  # the folder below the weights
CLASSIFIER = "emoji"
ALIAS = "production"
ENCODER = "text_encoder/model.safetensors"
PATIENCE = 1200.0  # seconds for any one wait
STARTING = 90.0  # seconds for the service to answer


class DemoError(Exception):
    """Why the demo could not go on, and what to do."""


@dataclass
class Stages:
    """Says what is being done, and keeps how many seconds each stage took."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, what: str, *, total: int | None = None) -> Iterator[Callable[[float], None]]:
        """Show a progress bar for a stage. The block receives the function that advances it."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        start = time.monotonic()
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(f"{what:<44}", total=total)
            yield lambda done: bar.advance(task, done)
            finished = total if total is not None else 1
            bar.update(task, completed=finished, total=finished)
        self.seconds[name] = round(time.monotonic() - start, 1)


def run(out: Path, *, weights: Path | None = None, quiet: bool = False) -> Json:
    """Run the demo, with its files in `out`; returns the report. `quiet` leaves standard output alone.

    Raises `DemoError`; the service's log then stays in `out/service`."""
    weights = weights or WEIGHTS
    if not (weights / SOURCE / "model_index.json").is_file():
        raise DemoError(f"{weights / SOURCE} holds no model; restore it from git, or name another folder by --weights.")
    service = out / "service"
    for folder in (service, out / "pulled"):
        shutil.rmtree(folder, ignore_errors=True)
    service.mkdir(parents=True)
    _quiet()
    stages = Stages(Console(stderr=quiet))
    start = time.monotonic()
    try:
        with PeakMemory() as memory:
            report = _correct_and_judge(out, weights=weights, service=service, stages=stages)
    except EmenderError as error:
        raise DemoError(f"{error}\nThe service's log is {service / 'service.log'}.") from error
    report["seconds"] = stages.seconds | {"total": round(time.monotonic() - start, 1)}
    report["peak_memory_mb"] = round(memory.peak_mb)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(service, ignore_errors=True)
    print_figures(report, stages.console)
    stages.console.print(f"{out / 'before-after.png'} and {out / 'report.json'} show it.", soft_wrap=True)
    return report


def _quiet() -> None:
    """No bars of the libraries between ours."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def _correct_and_judge(out: Path, *, weights: Path, service: Path, stages: Stages) -> Json:
    base = load_pipeline(weights / SOURCE)
    with _running(service, weights=weights, stages=stages) as (client, hub):
        checkpoint = _correct(client, base, stages=stages)
        with stages("pull", f"Pulling {checkpoint.version} with huggingface_hub"):
            huggingface_hub.snapshot_download(f"emender/{MODEL}", revision=ALIAS, local_dir=out / "pulled", **hub)
        with stages("check", "Waiting for the service's own check of it"):
            check = _check(client, checkpoint.version)
    published = next(file.sha256 for file in checkpoint.files if file.path == ENCODER)
    pulled = hashlib.sha256((out / "pulled" / ENCODER).read_bytes()).hexdigest()
    if pulled != published:
        raise DemoError(f"The pulled {ENCODER} has the sha256 {pulled}; {published} was published.")
    before, after = (
        _draw_results(pipeline, when, weights=weights, stages=stages)
        for when, pipeline in {"before": base, "after": load_pipeline(out / "pulled")}.items()
    )
    title = f"{len(EDITS)} edits in {MODEL} {checkpoint.version}: the same prompts, the same seeds"
    save_picture(out / "before-after.png", EDITS, before=before, after=after, title=title)
    return {
        **report_of(EDITS, before=before, after=after),
        "check": check,
        "checkpoint": {"version": checkpoint.version, "sha256": published},
        "pulled": {"sha256": pulled, "with": f"huggingface_hub {huggingface_hub.__version__}"},
    }


def _correct(client: Client, base: StableDiffusionPipeline, *, stages: Stages) -> CheckpointOut:
    """From registration to the published checkpoint, all of it over HTTP."""
    with stages("register", "Registering the emoji model"):
        client.models.register(MODEL, source=SOURCE, classifier=CLASSIFIER)
        model = client.models.wait(MODEL, timeout=PATIENCE)
        if model.statistics is None:
            created = client.statistics.create(MODEL, captions="captions")
            client.statistics.wait(MODEL, created.id, timeout=PATIENCE)
    with stages("edit", "Creating edits, optimizing their values", total=len(EDITS)) as advance:
        client.edits.create_batch(MODEL, [_request(client, base, edit) for edit in EDITS])
        _wait_for_edits(client, advance)
    with stages("apply", "Applying them to the text encoder"):
        checkpoint = client.checkpoints.apply(MODEL, edits="ready", alias=ALIAS, notes="make demo")
        return client.checkpoints.wait(MODEL, checkpoint.version, timeout=PATIENCE)


def _check(client: Client, version: str) -> Json:
    """Read the service's own check of the checkpoint, by the model's classifier."""
    (created,) = client.evaluations.list(MODEL, version, kind="check")
    report = client.evaluations.wait(MODEL, version, created.id, timeout=PATIENCE).report
    assert report is not None
    edits = report["edits"]
    return {"evaluated": len(edits), "succeeded": sum(edit["succeeded"] for edit in edits)}


def _wait_for_edits(client: Client, advance: Callable[[float], None]) -> None:
    """Wait until every edit is ready. `advance` moves the bar by the share of steps done."""
    done, deadline = 0.0, time.monotonic() + PATIENCE
    while True:
        edits = list(client.edits.list(model=MODEL))
        for edit in edits:
            if edit.state in ("failed", "cancelled"):
                raise WorkFailed(edit)
        now = sum(_share_done(edit) for edit in edits)
        advance(now - done)
        done = now
        if all(edit.state == "ready" for edit in edits):
            return
        if time.monotonic() > deadline:
            raise DemoError(f"The edits are not ready after {PATIENCE:.0f} s.")
        time.sleep(0.5)


def _share_done(edit: EditOut) -> float:
    if edit.state == "ready":
        return 1.0
    return edit.progress.done / edit.progress.total if edit.progress else 0.0


def _request(client: Client, base: StableDiffusionPipeline, edit: DemoEdit) -> dict[str, Any]:
    """Build the edit to create. Its reference images, drawn by the base model, are uploaded first."""
    if edit.kind != "images":
        return edit.request()
    prompts = [REFERENCE_PROMPT.format(edit.destination)] * len(REFERENCE_SEEDS)
    pictures = as_images(draw_pictures(base, prompts, REFERENCE_SEEDS))
    return edit.request(images=[client.images.upload(picture).id for picture in pictures])


def _draw_results(pipeline: StableDiffusionPipeline, when: str, *, weights: Path, stages: Stages) -> PipelinePictures:
    names = held_out(read_concepts())
    classifier = load_classifier(weights / "classifier.safetensors")
    with stages(when, f"Drawing {when}", total=picture_count(EDITS, names)) as advance:
        return draw_results(pipeline, classifier, edits=EDITS, held_out=names, advance=advance)


@contextmanager
def _running(folder: Path, *, weights: Path, stages: Stages) -> Iterator[tuple[Client, dict[str, Any]]]:
    """Run `emender serve --embedded` on a free port. Yields a client, and endpoint and token for Hub clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    environment |= {
        "EMENDER_DATA_DIR": str(folder.absolute()),
        "EMENDER_PORT": str(port),
        "EMENDER_MODEL_ROOTS": str(weights.absolute()),
        "EMENDER_POLL_INTERVAL_SECONDS": "0.2",
    }
    command = [sys.executable, "-m", "app.cli.main", "serve", "--embedded"]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent()
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with stages("start", "Starting Postgres, API and worker"):
            _await_service(process, url, folder=folder)
        key = (folder / "admin-key").read_text().strip()
        with Client(url, api_key=key) as client:
            yield client, {"endpoint": url, "token": key}
    finally:
        process.terminate()
        process.wait()


def _await_service(process: subprocess.Popen[bytes], url: str, *, folder: Path) -> None:
    """Return once the API answers; raise `DemoError` with the last lines of its log where it does not."""
    deadline = time.monotonic() + STARTING
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(f"{url}/readyz", trust_env=False).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    tail = (folder / "service.log").read_text(errors="replace").strip().splitlines()[-5:]
    raise DemoError("The service did not start.\n" + "\n".join(tail))
