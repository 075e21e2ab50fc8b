"""The service under load: edits posted and listed, a checkpoint read, a file pulled, by 64 clients at once.

    python -m benchmarks.service --json service.json 2> service.log

wrk asks, over connections that it keeps, as fast as it is answered. Everything runs on this machine: wrk, the API
(one process) and the embedded Postgres. For comparison, `benchmarks.bare` only inserts a row in the same Postgres,
and nginx serves the same file. Sides take turns. Each row is the median of the repeats. Rates are not limited, and no
worker runs.

The last line on stdout is JSON: `post_ratio` is ours over the bare insert in requests a second. `post_cpu_ratio` is
the bare CPU time a request over ours. `list_ratio` is the p99 of the newest edits at the most rows over that at the
fewest, `worst_list_ratio` that of any list. `pull_ratio` is ours over nginx. "ours, once" posts under an
`Idempotency-Key` each. The API's log is on standard error. The exit status is 1 where wrk or nginx is missing, or
where any request was not answered with 2xx.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import psycopg
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from app.auth.service import create_key
from app.db.engine import connect, sessions
from app.db.models import ModelFile
from app.local.child_process import ManagedProcess
from app.local.supervisor import Stack
from app.settings import Settings
from app.storage.local import LocalStore
from benchmarks import bare
from benchmarks.measuring import POSITIONS, TOKENIZER, is_reachable, say, uvicorn_arguments
from benchmarks.pull import PATH, Missing, free_port, nginx, nginx_path, version_of, write_file

MODEL = "loaded"
API, BARE = "app.local.api_process", "benchmarks.bare:application"
SCRIPT = Path(__file__).with_name("load.lua")
LISTS = {
    "newest": "",
    "of a model": f"&model={MODEL}",
    "failed": "&state=failed",
    "of a source": "&source=concept%207",
    "of a key": "&created_by=key:seldom",
}
"""The lists that are measured, and their queries. `RARE` of the first edits failed, and as many are of the seldom key:
the same page however many edits there are, and ever further from the newest."""
RARE = 60

# An id is a UUIDv7 a millisecond after the one before; each edit has its job and its values, as a worker leaves them.
SEED = """
    CREATE TEMPORARY TABLE seeded ON COMMIT DROP AS
        SELECT number, (lpad(to_hex(1750000000000 + number), 12, '0') || '7' || substr(md5(number::text), 1, 3)
            || '8' || substr(md5(number::text), 4, 15))::uuid AS id
        FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS number;
    INSERT INTO edits (id, model_id, source, destination, templates, settings, labels, state, created_by)
        SELECT seeded.id, base_models.id, 'concept ' || number, '{"prompt": "a red fox"}', ARRAY['an image of a {}'],
            '{"objective": "text"}', '{}', CASE WHEN number <= :rare THEN 'failed' ELSE 'ready' END,
            CASE WHEN number <= :rare THEN 'key:seldom' ELSE 'key:often' END
        FROM seeded, base_models WHERE base_models.name = :model;
    INSERT INTO jobs (id, kind, target_id, state, attempt, payload_version, cancel_requested)
        SELECT id, 'optimize_edit', id, 'succeeded', 1, 1, false FROM seeded;
    INSERT INTO edit_values (edit_id, content, sha256, encoders, losses, attempt, engine)
        SELECT id, '\\x00', md5(id::text),
            '[{"name": "text_encoder", "layer": 10, "delta_norm": 1.0, "hidden_norm": 1.0}]',
            '{"text": [0.1], "noise": []}', 1, 'seed' FROM seeded;
"""


class Unanswered(Exception):
    """No request was answered in the time that a side had."""


@dataclass(frozen=True)
class Target:
    """What is asked for: a URL, with the key that it needs; edits are posted to it where `posts`, each under an
    Idempotency-Key of its own where `once`. `server` is in the command line of what answers."""

    url: str
    server: str
    token: str = ""
    posts: bool = False
    once: bool = False


@dataclass(frozen=True)
class Service:
    """The API, the bare insert and nginx, all running."""

    engine: Engine
    post: dict[str, Target]
    pull: dict[str, Target]
    checkpoint: Target
    edits: Target


def wrk_path() -> str:
    found = shutil.which("wrk")
    if found is None:
        raise Missing("wrk is not installed: install it (apt-get install wrk), and run this again.")
    return found


def run_load(target: Target, *, clients: int, seconds: int) -> dict[str, float]:
    """Let the clients ask for so long; what wrk counted."""
    variables = {"LOAD_TOKEN": target.token} if target.token else {}
    if target.posts:
        variables["LOAD_SOURCE"] = f"concept {time.time_ns()}"
    if target.once:
        variables["LOAD_ONCE"] = "yes"
    command = [wrk_path(), "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "30s", "--script", str(SCRIPT)]
    before = cpu_seconds(target.server)
    done = subprocess.run(
        [*command, target.url], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | variables
    )
    time.sleep(2)  # the service ends what wrk left unanswered
    spent = cpu_seconds(target.server) - before
    counted: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if not counted["requests"]:
        raise Unanswered(f"{target.url} answered nothing in {seconds} s; its log may say why.")
    return {
        "requests_per_second": counted["requests"] / counted["seconds"],
        "bytes_per_second": counted["bytes"] / counted["seconds"],
        "p50_ms": counted["p50_ms"],
        "p99_ms": counted["p99_ms"],
        "cpu_ms": 1000 * spent / counted["requests"],
        "requests": counted["requests"],
        "errors": counted["refused"] + counted["broken"],
    }


def cpu_seconds(server: str) -> float:
    """Return the CPU time of the server's processes so far."""
    spent = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if server in " ".join(process.cmdline()):
                spent += sum(process.cpu_times()[:2])
    return spent


def compare(case: str, sides: dict[str, Target], chosen: argparse.Namespace, **about: object) -> list[dict[str, Any]]:
    """Each side by turns; a row of medians for each. Requests and errors are summed."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for target in sides.values():
        run_load(target, clients=chosen.clients, seconds=1)  # warm
    for _ in range(chosen.repeats):
        for side, target in sides.items():
            runs[side].append(run_load(target, clients=chosen.clients, seconds=chosen.seconds))
    rows = []
    for side, each in runs.items():
        row: dict[str, Any] = {"case": case, "side": side, **about}
        row |= {name: median(run[name] for run in each) for name in each[0]}
        row |= {name: sum(run[name] for run in each) for name in ("requests", "errors")}
        rows.append(row)
        say(f"{case}, {side}: {row['requests_per_second']:.0f}/s, p99 {row['p99_ms']:.0f} ms")
    return rows


def seed(engine: Engine, *, first: int, last: int) -> None:
    """Edits by number, straight into the database."""
    with engine.begin() as connection:
        for statement in SEED.strip().split(";\n"):
            connection.execute(text(statement), {"first": first, "last": last, "model": MODEL, "rare": RARE})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


@contextmanager
def running(folder: Path, *, megabytes: float) -> Iterator[Service]:
    """Add a ready model with the emoji model's tokenizer and a version that serves a file."""
    (folder / "files").mkdir(mode=0o755)
    file = folder / "files" / "file.bin"
    write_file(file, size=int(megabytes * 1e6))
    file.chmod(0o644)
    (folder / "api").mkdir(mode=0o711)
    settings = Settings(
        data_dir=folder / "api", port=free_port(), signing_key_file="none", rate_limit="off", model_roots=()
    )
    store = LocalStore(settings.store_dir)
    with Stack(settings, embedded=True, workers=0) as stack:
        assert stack.settings.database_url is not None
        url = stack.settings.database_url.get_secret_value()
        engine = connect(url)
        with sessions(engine)() as session:
            version = version_of(MODEL, file, store=store)
            version.model.encoders = [{"name": "text_encoder", "layers": 12, "width": 768, "mlp_width": 3072}]
            for part in tokenizer_files(folder / "tokenizer"):
                name, size = f"tokenizer/{part.name}", part.stat().st_size
                version.model.files.append(ModelFile(path=name, sha256=store.put_file(part), size=size))
            session.add(version)
            _, token = create_key(session, name="benchmark", scopes=["admin"], actor="benchmark")
            session.commit()
        with (
            bare_insert(url.replace("+psycopg", "")) as plain,
            nginx(folder / "nginx", file, port=free_port()) as files,
        ):
            api = f"{stack.url}/v1"
            yield Service(
                engine,
                post={
                    "bare": plain,
                    "ours, once": Target(f"{api}/models/{MODEL}/edits", API, token, posts=True, once=True),
                    "ours": Target(f"{api}/models/{MODEL}/edits", API, token, posts=True),
                },
                pull={
                    "nginx": Target(files.url, "nginx"),
                    "ours": Target(f"{stack.url}/emender/{MODEL}/resolve/v1/{PATH}", API, token),
                },
                checkpoint=Target(f"{api}/models/{MODEL}/checkpoints/v1", API, token),
                edits=Target(f"{api}/edits?limit=50", API, token),
            )
        engine.dispose()


def tokenizer_files(folder: Path) -> list[Path]:
    """Return that of the emoji model, for prompts of CLIP's length."""
    shutil.copytree(TOKENIZER, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": POSITIONS}))
    return sorted(folder.iterdir())


@contextmanager
def bare_insert(url: str) -> Iterator[Target]:
    """`benchmarks.bare` on the same Postgres, served as the API is."""
    with psycopg.connect(url) as connection:
        connection.execute(bare.TABLE)
    port = free_port()
    served = uvicorn_arguments(BARE, port=port)
    child = ManagedProcess("bare", served, os.environ | {"BARE_DATABASE_URL": url})
    child.start()
    try:
        deadline = time.monotonic() + 60
        while not is_reachable(f"http://127.0.0.1:{port}/docs"):
            if not child.is_running or time.monotonic() > deadline:
                raise Missing("benchmarks.bare did not start; its last lines above say why.")
            time.sleep(0.1)
        yield Target(f"http://127.0.0.1:{port}/edits", BARE, posts=True)
    finally:
        child.terminate()
        child.wait(time.monotonic() + 10)


def measure(chosen: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    wrk_path()
    nginx_path()
    folder.chmod(0o711)  # under root, Postgres and nginx's worker run as others
    rows: list[dict[str, Any]] = []
    with running(folder, megabytes=chosen.megabytes) as service:
        held = 0
        for count in sorted(chosen.rows):
            seed(service.engine, first=held + 1, last=count)
            held = count
            say(f"{count:,} edits")
            for name, query in LISTS.items():
                target = replace(service.edits, url=service.edits.url + query)
                rows += compare(f"list, {name}", {"ours": target}, chosen, edits=count)
        rows += compare("post", service.post, chosen)
        rows += compare("checkpoint", {"ours": service.checkpoint}, chosen)
        rows += compare("pull", service.pull, chosen, megabytes=chosen.megabytes)
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the summary: the last row of a case over its first."""

    def ratio(case: str, figure: str) -> float:
        found = [row[figure] for row in rows if row["case"] == case]
        return float(found[-1] / found[0])

    return {
        "post_ratio": ratio("post", "requests_per_second"),
        "post_cpu_ratio": 1 / ratio("post", "cpu_ms"),
        "list_ratio": ratio("list, newest", "p99_ms"),
        "worst_list_ratio": max(ratio(f"list, {name}", "p99_ms") for name in LISTS),
        "pull_ratio": ratio("pull", "requests_per_second"),
        "errors": sum(row["errors"] for row in rows),
    }


def table(rows: Sequence[dict[str, Any]], *, clients: int) -> Table:
    shown = Table(title=f"Service, {clients} clients")
    shown.add_column("case")
    shown.add_column("side")
    for column in ("edits", "requests/s", "p50 ms", "p99 ms", "CPU ms", "requests", "errors"):
        shown.add_column(column, justify="right")
    for row in rows:
        times = (f"{row[name]:,.0f}" for name in ("requests_per_second", "p50_ms", "p99_ms"))
        edits = f"{row['edits']:,}" if "edits" in row else ""
        counts = (f"{row[name]:,.0f}" for name in ("requests", "errors"))
        shown.add_row(row["case"], row["side"], edits, *times, f"{row['cpu_ms']:.2f}", *counts)
    return shown


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000], help="edits that are listed")
    parser.add_argument("--seconds", type=int, default=5, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=3, help="the median is shown")
    parser.add_argument("--megabytes", type=float, default=1, help="the size of the file that is pulled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="service-") as folder:
            rows = measure(chosen, Path(folder))
    except (Missing, Unanswered) as error:
        say(str(error))
        return 1
    Console(width=120).print(table(rows, clients=chosen.clients))
    summary = ratios(rows) | {"clients": chosen.clients, "cores": os.cpu_count(), "rows": rows}
    if chosen.json:
        chosen.json.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))  # noqa: T201
    if summary["errors"]:
        say(f"{summary['errors']:.0f} requests were not answered with 2xx.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
