"""CPU per request of the API, as ratios to bare FastAPI and SQLAlchemy routes on the same database.

    python -m benchmarks.requests --json requests.json 2> requests.log

The bare routes do the same work in plain form, through the ORM and pydantic, in one session each. POST inserts an edit,
its job, its chained audit event and the idempotency key with the response. The list reads 50 edits with their jobs and
values. The checkpoint is read with its model, edits, files, aliases, evaluations and job. The bare routes check no API
key, no limit and no prompt. CPU time is that of the server's processes. Sides take turns, and each figure is the median
of the repeats.

The last line on stdout is JSON: `post_ratio`, `list_ratio` and `checkpoint_ratio` are ours over the bare CPU time per
request; `processes_ratio` is the list's requests per second of two API processes over those of one.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from uuid import UUID

import psutil
from fastapi import FastAPI, Header
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select, text
from sqlalchemy.orm import selectinload
from uuid_utils.compat import uuid7

from app.audit.service import LOCK
from app.auth.service import create_key
from app.db.engine import connect, sessions
from app.db.models import (
    Alias,
    AuditEvent,
    Checkpoint,
    Edit,
    EditValue,
    Evaluation,
    IdempotencyKey,
    Job,
    Model,
    ModelFile,
)
from app.local.child_process import ManagedProcess
from app.local.supervisor import Stack
from app.settings import Settings
from app.storage.local import LocalStore
from benchmarks import bare
from benchmarks.measuring import is_reachable, say, uvicorn_arguments
from benchmarks.pull import free_port, version_of, write_file
from benchmarks.service import MODEL, tokenizer_files

BARE = "benchmarks.requests:application"


class BareEdit(bare.Edit):
    templates: list[str] = ["{}"]


class BareEditOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: UUID
    source: str
    destination: dict[str, Any]
    templates: list[str]
    settings: dict[str, Any]
    labels: dict[str, str]
    state: str
    created_by: str
    created_at: datetime
    updated_at: datetime


class BareFile(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    path: str
    sha256: str
    size: int


class BareCheckpointOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: UUID
    number: int
    state: str
    commit: str | None
    created_by: str
    files: list[BareFile]


def application() -> FastAPI:
    """Return the bare application, for uvicorn."""
    factory, app = sessions(connect(os.environ["BARE_DATABASE_URL"])), FastAPI()
    with factory() as session:
        model_id = session.scalars(select(Model.id)).one()

    @app.post("/edits", status_code=202)
    def create_edit(edit: BareEdit, idempotency_key: Annotated[str, Header()]) -> BareEditOut:
        with factory() as session:
            row = Edit(
                id=uuid7(), model_id=model_id, created_by="key:bare", settings={}, labels={}, **edit.model_dump()
            )
            session.add_all([row, Job(kind="optimize_edit", target_id=row.id, created_by="key:bare")])
            session.flush()
            session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            newest = select(AuditEvent.sequence, AuditEvent.hash).order_by(AuditEvent.sequence.desc()).limit(1)
            sequence, previous = session.execute(newest).one_or_none() or (0, bytes(32))
            event = {"actor": "key:bare", "action": "edit.create", "target": f"edit:{row.id}", "details": {}}
            digest = hashlib.sha256(json.dumps([event, previous.hex()]).encode()).digest()
            chain = {"sequence": sequence + 1, "at": datetime.now(UTC), "previous_hash": previous, "hash": digest}
            session.add(AuditEvent(**event, **chain))
            out = BareEditOut.model_validate(row)
            body, identity = out.model_dump_json().encode(), {"principal": "key:bare", "key": idempotency_key}
            session.add(IdempotencyKey(**identity, request_sha256=digest, status=202, headers={}, body=body))
            session.commit()
        return out

    @app.get("/edits")
    def list_edits() -> list[BareEditOut]:
        with factory() as session:
            rows = session.scalars(select(Edit).order_by(Edit.id.desc()).limit(50)).all()
            ids = [row.id for row in rows]
            session.scalars(select(Job).where(Job.target_id.in_(ids))).all()
            session.execute(select(EditValue.edit_id, EditValue.sha256).where(EditValue.edit_id.in_(ids))).all()
            return [BareEditOut.model_validate(row) for row in rows]

    @app.get("/checkpoint")
    def read_checkpoint() -> BareCheckpointOut:
        with factory() as session:
            query = select(Checkpoint).options(selectinload(Checkpoint.edits), selectinload(Checkpoint.files))
            checkpoint = session.scalars(query).one()
            session.get_one(Model, checkpoint.model_id)
            for kind, column in ((Alias, Alias.checkpoint_id), (Evaluation, Evaluation.checkpoint_id)):
                session.scalars(select(kind).where(column == checkpoint.id)).all()
            session.scalars(select(Job).where(Job.target_id == checkpoint.id)).all()
            return BareCheckpointOut.model_validate(checkpoint)

    return app


async def send(url: str, path: str, *, token: str, count: int, clients: int = 16) -> None:
    """Send requests over connections that stay open; a POST for paths that end in `edits`."""
    host, port = url.removeprefix("http://").split(":")
    left, tag = iter(range(count)), time.time_ns()

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in left:
            body = b""
            method, target = path.split(" ")
            if method == "POST":
                edit = {"source": f"concept {tag} {number}", "destination": {"prompt": "a red fox"}}
                body = json.dumps(edit).encode()
            head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
            head += f"Idempotency-Key: {tag}-{number}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            response = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if response.split()[1][0] != "2":
                raise RuntimeError(response)
            await reader.readexactly(int(response.split("content-length: ")[1].split("\r\n")[0]))
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))


def cpu_seconds(name: str) -> float:
    """Return the CPU time of the processes that serve an application."""
    children = psutil.Process().children(recursive=True)
    return sum(sum(process.cpu_times()[:2]) for process in children if name in process.cmdline())


def measure(chosen: argparse.Namespace, folder: Path, *, processes: int) -> dict[str, dict[str, list[float]]]:
    """Return CPU milliseconds per request and requests per second, by case and side."""
    settings = Settings(
        data_dir=folder, port=free_port(), signing_key_file="none", rate_limit="off", api_processes=processes
    )
    found: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as running:
        stack = running.enter_context(Stack(settings, embedded=True, workers=0))
        assert stack.settings.database_url is not None
        url, store = stack.settings.database_url.get_secret_value(), LocalStore(settings.store_dir)
        engine = connect(url)
        running.callback(engine.dispose)
        file = folder / "file.bin"
        write_file(file, size=1000)
        with sessions(engine)() as session:
            version = version_of(MODEL, file, store=store)
            version.model.encoders = [{"name": "text_encoder", "layers": 12, "width": 768, "mlp_width": 3072}]
            for part in tokenizer_files(folder / "tokenizer"):
                sha256, size = store.put_file(part), part.stat().st_size
                version.model.files.append(ModelFile(path=f"tokenizer/{part.name}", sha256=sha256, size=size))
            session.add(version)
            _, token = create_key(session, name="benchmark", scopes=["admin"], actor="benchmark")
            session.commit()
        port = free_port()
        arguments = uvicorn_arguments(BARE, port=port)
        bare_server = ManagedProcess("bare", arguments, os.environ | {"BARE_DATABASE_URL": url})
        bare_server.start()
        running.callback(lambda: bare_server.wait(time.monotonic() + 10))
        running.callback(bare_server.terminate)
        plain = f"http://127.0.0.1:{port}"
        while not is_reachable(f"{plain}/openapi.json"):
            time.sleep(0.2)
        cases = {
            "post": ("POST /edits", f"POST /v1/models/{MODEL}/edits"),
            "list": ("GET /edits", "GET /v1/edits?limit=50"),
            "checkpoint": ("GET /checkpoint", f"GET /v1/models/{MODEL}/checkpoints/v1"),
        }
        for case, (bare_path, our_path) in cases.items():
            sides = {"bare": (plain, bare_path, BARE), "ours": (stack.url, our_path, "app.local.api_process")}
            found[case] = {f"{side} {figure}": [] for side in sides for figure in ("cpu_ms", "per_second")}
            for repeat in range(chosen.repeats + 1):
                for side, (where, path, server) in sides.items():
                    before, start = cpu_seconds(server), time.perf_counter()
                    asyncio.run(send(where, path, token=token, count=chosen.requests))
                    seconds = time.perf_counter() - start
                    if repeat:  # the first warms up
                        spent = 1000 * (cpu_seconds(server) - before) / chosen.requests
                        found[case][f"{side} cpu_ms"].append(spent)
                        found[case][f"{side} per_second"].append(chosen.requests / seconds)
            say(f"{processes} process(es), {case}: {found[case]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="the median is shown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    chosen = parser.parse_args(arguments)
    figures = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory(prefix="requests-") as folder:
            Path(folder).chmod(0o711)  # under root, Postgres runs as another user
            figures.append(measure(chosen, Path(folder), processes=processes))
    one, two = figures
    summary: dict[str, Any] = {
        f"{case}_ratio": median(sides["ours cpu_ms"]) / median(sides["bare cpu_ms"]) for case, sides in one.items()
    }
    summary["processes_ratio"] = median(two["list"]["ours per_second"]) / median(one["list"]["ours per_second"])
    summary |= {"cores": os.cpu_count(), "one_process": one, "two_processes": two}
    if chosen.json:
        chosen.json.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
