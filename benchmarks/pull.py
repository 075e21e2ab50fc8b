"""Pulls over loopback: the API's process against nginx serving the same file, at one client and at many.

    python -m benchmarks.pull --json pull.json

A model whose one large file is served by the Hub's `resolve` from a store of its own, on the embedded Postgres. nginx
has one worker process, with sendfile, as the API is one process. Clients are threads that throw the bytes away, each
on a connection of its own. The API hashes the file when it is first asked, which `first` has, and sends it again
without that for ten minutes. The two sides take turns, and the median of the repeats is shown.

The last line on stdout is JSON: `ratio` is ours over nginx in bytes a second, at the most clients. Memory is the API
process': before the clients, at its peak among them, and after them. The exit status is 1 where nginx is
missing, or where the API sends other bytes than the file's.
"""

import argparse
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from app.auth.service import create_key
from app.db.engine import connect, sessions
from app.db.models import Checkpoint, Model, ModelFile
from app.local.child_process import die_with_parent
from app.local.supervisor import Stack
from app.settings import Settings
from app.storage.local import LocalStore
from benchmarks.measuring import forget_peak, peak_bytes, say

PROGRAMS = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"  # where Debian has nginx
PATH = "unet/diffusion_pytorch_model.safetensors"
NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class Missing(Exception):
    """nginx is not installed, or does not start; the message says what to do."""


class Unlike(Exception):
    """A side did not send the file."""


@dataclass(frozen=True)
class Side:
    """A server of the file, and the process that serves it."""

    url: str
    process: psutil.Process
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def nginx_path() -> str:
    found = shutil.which("nginx", path=PROGRAMS)
    if found is None:
        raise Missing("nginx is not installed: install it (apt-get install nginx-light), and run this again.")
    return found


def write_file(path: Path, *, size: int) -> str:
    """Random bytes; returns their sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while left := size - file.tell():
            chunk = os.urandom(min(left, 1 << 20))
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def version_of(name: str, file: Path, *, store: LocalStore) -> Checkpoint:
    """Return the first version of a ready model that serves the file at `PATH`."""
    model = Model(name=name, namespace="emender", source=name, state="ready", created_by="benchmark")
    model.files = [ModelFile(path=PATH, sha256=store.put_file(file), size=file.stat().st_size)]
    version = Checkpoint(model=model, number=1, state="published", commit="0" * 40, created_by="benchmark")
    version.layers, version.options, version.published_at = [], {}, datetime.now(UTC)
    return version


@contextmanager
def api(folder: Path, file: Path, *, port: int) -> Iterator[Side]:
    """Run the API on a published version that serves the file."""
    folder.mkdir(mode=0o711)
    settings = Settings(data_dir=folder, port=port, signing_key_file="none", rate_limit="off", model_roots=())
    store = LocalStore(settings.store_dir)
    with Stack(settings, embedded=True, workers=0) as stack:
        assert stack.settings.database_url is not None
        engine = connect(stack.settings.database_url.get_secret_value())
        with sessions(engine)() as session:
            session.add(version_of("pulled", file, store=store))
            _, token = create_key(session, name="benchmark", scopes=["read"], actor="benchmark")
            session.commit()
        engine.dispose()
        children = psutil.Process().children()
        process = next(child for child in children if "app.main:application" in child.cmdline())
        yield Side(f"{stack.url}/emender/pulled/resolve/v1/{PATH}", process, {"Authorization": f"Bearer {token}"})


@contextmanager
def nginx(folder: Path, file: Path, *, port: int) -> Iterator[Side]:
    """Run nginx on the file's folder."""
    folder.mkdir(mode=0o711)
    configuration = folder / "nginx.conf"
    configuration.write_text(NGINX.format(folder=folder, port=port, root=file.parent))
    command = [nginx_path(), "-p", str(folder), "-c", str(configuration)]
    process = subprocess.Popen(command, preexec_fn=die_with_parent())
    try:
        master = psutil.Process(process.pid)
        deadline = time.monotonic() + 20
        while not (workers := master.children()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Missing("nginx did not start; its last lines above say why.")
            time.sleep(0.02)
        yield Side(f"http://127.0.0.1:{port}/{file.name}", workers[0])
    finally:
        process.terminate()
        process.wait()


def get(side: Side, *, times: int, seen: Callable[[memoryview], object] = len) -> int:
    """Get the file so many times over one connection, each piece shown to `seen`; returns how many bytes came."""
    host, _, path = side.url.removeprefix("http://").partition("/")
    connection, buffer, came = http.client.HTTPConnection(host), memoryview(bytearray(1 << 20)), 0
    for _ in range(times):
        connection.request("GET", f"/{path}", headers=side.headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Unlike(f"{side.url} answers {response.status}")
        while count := response.readinto(buffer):
            seen(buffer[:count])
            came += count
    connection.close()
    return came


def pull(side: Side, *, clients: int, times: int, size: int) -> dict[str, float]:
    """Let each client get the file so many times; what it took, and the serving process' CPU time and memory."""
    before = side.process.memory_info().rss
    forget_peak(side.process.pid)
    with ThreadPoolExecutor(clients) as pool:
        spent, clock = _cpu(side.process), time.perf_counter()
        came = list(pool.map(lambda _: get(side, times=times), range(clients)))
        seconds, spent = time.perf_counter() - clock, _cpu(side.process) - spent
    if came != [times * size] * clients:
        raise Unlike(f"{side.url} sent another number of bytes than the file's")
    return {
        "bytes_per_second": sum(came) / seconds,
        "seconds": seconds,
        "cpu_seconds_per_gb": spent / (sum(came) / 1e9),
        "rss_before": before,
        "rss_peak": peak_bytes(side.process.pid),
        "rss_after": side.process.memory_info().rss,
    }


def compare(chosen: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    nginx_path()
    folder.chmod(0o711)  # under root, Postgres and nginx's worker run as others
    size = int(chosen.megabytes * 1e6)
    (folder / "files").mkdir(mode=0o755)
    file = folder / "files" / "large.bin"
    sha256 = write_file(file, size=size)
    file.chmod(0o644)
    rows = []
    with api(folder / "api", file, port=free_port()) as ours, nginx(folder / "nginx", file, port=free_port()) as plain:
        first = pull(ours, clients=1, times=1, size=size)
        digest = hashlib.sha256()
        get(ours, times=1, seen=digest.update)
        if digest.hexdigest() != sha256:
            raise Unlike("the API sent other bytes than the file's")
        for clients in sorted(chosen.clients):
            times = max(1, chosen.pulls // clients)
            runs: dict[str, list[dict[str, float]]] = {"nginx": [], "ours": []}
            for _ in range(chosen.repeats):
                for name, side in (("nginx", plain), ("ours", ours)):
                    runs[name].append(pull(side, clients=clients, times=times, size=size))
            row: dict[str, Any] = {"clients": clients, "pulls": clients * times}
            row |= {name: {key: median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
            row["ratio"] = row["ours"]["bytes_per_second"] / row["nginx"]["bytes_per_second"]
            rows.append(row)
            say(f"{clients} clients: {row['ratio']:.2f} of nginx")
    return first, rows


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="Pulls")
    for column in ("clients", "pulls", "nginx MB/s", "ours MB/s", "ratio", "nginx CPU s/GB", "ours CPU s/GB"):
        shown.add_column(column, justify="right")
    for column in ("ours MiB before", "peak", "after"):
        shown.add_column(column, justify="right")
    for row in rows:
        mine, other = row["ours"], row["nginx"]
        shown.add_row(
            str(row["clients"]),
            str(row["pulls"]),
            *(f"{side['bytes_per_second'] / 1e6:.0f}" for side in (other, mine)),
            f"{row['ratio']:.2f}",
            *(f"{side['cpu_seconds_per_gb']:.2f}" for side in (other, mine)),
            *(f"{mine[name] / 2**20:.0f}" for name in ("rss_before", "rss_peak", "rss_after")),
        )
    return shown


def _cpu(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return spent.user + spent.system


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--megabytes", type=float, default=200, help="the size of the file")
    parser.add_argument("--pulls", type=int, default=32, help="of the file, by all clients together in one repeat")
    parser.add_argument("--repeats", type=int, default=3, help="the median is shown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="pull-") as folder:
            first, rows = compare(chosen, Path(folder))
    except (Missing, Unlike) as error:
        say(str(error))
        return 1
    Console(width=130).print(table(rows))
    say(f"first pull, hashed before it is sent: {first['bytes_per_second'] / 1e6:.0f} MB/s")
    summary = {"ratio": rows[-1]["ratio"], "megabytes": chosen.megabytes, "cores": os.cpu_count()}
    summary |= {"first": first, "rows": rows}
    if chosen.json:
        chosen.json.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
