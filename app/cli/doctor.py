"""`emender doctor`: what an operator would check by hand, a finding for each, and what to do about it.

Findings name settings and files, never a secret, nor what a file with one holds.
"""

import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

import editing
from app.db.engine import connect
from app.db.grants import APPEND_ONLY
from app.db.migrate import SchemaBehind, check_schema
from app.db.models import Base
from app.jobs import workers
from app.jobs.redis_notifier import ping
from app.local.embedded_postgres import EmbeddedError, find_running_url
from app.settings import Settings
from app.signing.keys import UNSIGNED, SigningKeyUnusable, read_configured_key
from app.storage import open_store

FREE = 10 * 2**30  # bytes, below which the disk is worth a warning: some versions of a large model
SKEW_SECONDS = 5.0

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and where that is not well, the next step."""

    check: str
    state: State
    detail: str
    next_step: str | None = None


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check, one after the other; what cannot be checked without the database is left out where it is away."""
    yield from _database(settings)
    yield from _redis(settings)
    yield _store(settings)
    yield _disk(settings)
    yield _signing_key(settings)
    yield from _webhook_secret_key(settings)
    yield from _model_roots(settings)
    yield _torch(settings)


def _database(settings: Settings) -> Iterator[Finding]:
    try:
        url = settings.database_url.get_secret_value() if settings.database_url else find_running_url(settings.data_dir)
    except EmbeddedError as error:
        yield Finding("database", "failure", str(error), "Set EMENDER_DATABASE_URL.")
        return
    try:
        engine = connect(url)
    except Exception as error:  # whatever SQLAlchemy says of a URL, it may quote it
        detail = f"EMENDER_DATABASE_URL is no URL of a database ({type(error).__name__})."
        yield Finding("database", "failure", detail, "Write it as postgresql://user:password@host/database.")
        return
    try:
        with Session(engine) as session:
            version = session.scalar(text("SHOW server_version"))
            yield Finding("database", "ok", f"Postgres {version} answers.")
            yield from _inside(session)
    except SQLAlchemyError as error:
        detail = f"It does not answer as it should ({type(getattr(error, 'orig', error)).__name__})."
        yield Finding("database", "failure", detail, "Check EMENDER_DATABASE_URL, the server, and the role's password.")
    finally:
        engine.dispose()


def _inside(session: Session) -> Iterator[Finding]:
    try:
        newest = check_schema(session)
    except SchemaBehind as behind:
        yield Finding("schema", "failure", str(behind), "Run `emender migrate` as the role that owns the tables.")
        return
    if newest:
        yield Finding("schema", "ok", "It has every migration of this version.")
    else:
        yield Finding("schema", "warning", "It is newer than this version.", "Install the version that migrated it.")
    yield _role(session)
    yield _clock(session)
    yield from _workers(session)


def _role(session: Session) -> Finding:
    role = session.scalar(text("SELECT current_user"))
    rights = text("SELECT has_table_privilege(:table, 'INSERT'), has_table_privilege(:table, 'UPDATE')")
    can = [session.execute(rights, {"table": table}).one() for table in (*APPEND_ONLY, *Base.metadata.tables)]
    if not all(insert for insert, _ in can):
        step = f"Run `emender migrate --service-role {role}` as the role that owns the tables."
        return Finding("role", "failure", f"The role {role} may not use every table.", step)
    if any(update for _, update in can[: len(APPEND_ONLY)]):
        step = "Let the service connect as a role of its own: `emender migrate --service-role NAME`."
        return Finding("role", "warning", f"The role {role} may rewrite history; a trigger alone refuses it.", step)
    return Finding("role", "ok", f"The role {role} uses the tables, and cannot rewrite history.")


def _clock(session: Session) -> Finding:
    before = time.monotonic()
    theirs = session.scalars(text("SELECT clock_timestamp()")).one()
    took = time.monotonic() - before
    apart = abs((datetime.now(UTC) - theirs).total_seconds())
    if apart > SKEW_SECONDS + took:
        detail = f"This machine's clock and the database's are {apart:.0f} s apart."
        return Finding("clock", "warning", detail, "Let both follow NTP: webhooks are signed with this machine's time.")
    return Finding("clock", "ok", f"It is within {SKEW_SECONDS:.0f} s of the database's.")


def _workers(session: Session) -> Iterator[Finding]:
    alive = workers.count_alive(session)
    count = sum(alive.values())
    if not count:
        yield Finding("workers", "warning", "None is alive: jobs wait.", "Start one: `emender worker`.")
        return
    yield Finding("workers", "ok", f"{count} alive.")
    others = {version: number for version, number in alive.items() if version != editing.__version__}
    if others:
        told = ", ".join(f"{number} of {version}" for version, number in sorted(others.items()))
        detail = f"{told}; this is {editing.__version__}."
        yield Finding("versions", "warning", detail, "Restart them with this version, or install theirs here.")
    else:
        yield Finding("versions", "ok", f"All workers run {editing.__version__}.")


def _redis(settings: Settings) -> Iterator[Finding]:
    if settings.redis_url is None:
        yield Finding("redis", "ok", "None is set: workers poll Postgres.")
        return
    problem = ping(settings.redis_url.get_secret_value())
    if problem is None:
        yield Finding("redis", "ok", "It answers.")
    else:
        detail = f"It does not answer ({problem}): workers poll Postgres meanwhile."
        yield Finding("redis", "warning", detail, "Check EMENDER_REDIS_URL and the server.")


def _store(settings: Settings) -> Finding:
    where = str(settings.store or settings.store_dir)
    step = f"Let this user write to {where} and read there; `emender storage scrub` reads all that it holds."
    try:
        open_store(settings).probe()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return Finding("store", "failure", f"{where} cannot be written to and read: {reason}.", step)
    return Finding("store", "ok", f"{where}: a blob was written, read and verified.")


def _disk(settings: Settings) -> Finding:
    folder = next(path for path in (settings.store_dir, *settings.store_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{free / 2**30:.1f} GiB are free at {folder}."
    if free < FREE:
        return Finding("disk", "warning", detail, "Run `emender storage collect`, or make the disk larger.")
    return Finding("disk", "ok", detail)


def _signing_key(settings: Settings) -> Finding:
    setting, embedded = settings.signing_key_file, settings.data_dir / "signing-key.pem"
    if setting is None:
        if not embedded.exists():
            detail = "EMENDER_SIGNING_KEY_FILE is not set: a worker would not start; the API needs none."
            return Finding("signing key", "warning", detail, "`emender signing-key create FILE`, where workers run.")
        setting = embedded
    if setting == UNSIGNED:
        step = "Name a key in EMENDER_SIGNING_KEY_FILE, so that whoever pulls can verify."
        return Finding("signing key", "warning", "Versions are published without a signature.", step)
    try:
        key = read_configured_key(setting)
    except SigningKeyUnusable as error:
        return Finding("signing key", "failure", error.detail, "`emender signing-key create FILE` makes one.")
    assert key is not None
    if _is_open(Path(setting)):
        detail = f"The key {key.id} is in a file that others may read."
        return Finding("signing key", "warning", detail, f"chmod 600 {setting}")
    return Finding("signing key", "ok", f"The key {key.id} can be used.")


def _webhook_secret_key(settings: Settings) -> Iterator[Finding]:
    file = settings.data_dir / "webhook-key"
    if file.exists() and _is_open(file):
        yield Finding("webhook key", "warning", f"{file} can be read by others.", f"chmod 600 {file}")
    elif settings.webhook_secret_key is None and not file.exists():
        yield Finding("webhook key", "ok", "None is set: there are no webhooks.")
    else:
        yield Finding("webhook key", "ok", "It is set.")


def _is_open(file: Path) -> bool:
    return bool(file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def _model_roots(settings: Settings) -> Iterator[Finding]:
    for root in settings.model_roots:
        if not root.is_dir():
            step = "Make the folder or mount it, or take it out of EMENDER_MODEL_ROOTS."
            yield Finding("model roots", "failure", f"{root} is no folder.", step)
            continue
        found = len(list(root.glob("*/model_index.json")))
        yield Finding("model roots", "ok", f"{root} has {found} models.")


def _torch(settings: Settings) -> Finding:
    if find_spec("torch") is None:
        detail = "It is not installed: this machine can run the API, and no worker."
        return Finding("torch", "ok", detail)
    import torch

    found = f"torch {torch.__version__}"
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if settings.device != "auto":
            device = torch.device(settings.device)
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError):
        step = "Check the driver (`nvidia-smi`) and this build of torch, or set EMENDER_DEVICE=auto."
        return Finding("torch", "failure", f"{found} cannot compute on {settings.device}.", step)
    if device.type == "cpu":
        step = "Run workers where there is a GPU, if the model is larger than a toy."
        return Finding("torch", "warning" if settings.device == "auto" else "ok", f"{found} computes on the CPU.", step)
    return Finding("torch", "ok", f"{found} computes on {torch.cuda.get_device_name(device)}.")
