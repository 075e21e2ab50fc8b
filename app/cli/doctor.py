"""Checks of `emender doctor`.

Findings name settings and files, never a secret or the content of a file with one.
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

MIN_FREE_BYTES = 10 * 2**30
"""Less free disk space is a warning: some checkpoints of a large model."""
MAX_SKEW_SECONDS = 5.0

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """The result of a check, and the next step if it is not ok."""

    check: str
    state: State
    detail: str
    next_step: str | None = None


def examine(settings: Settings) -> Iterator[Finding]:
    """Run every check. Those that need the database are left out if it is down."""
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
    except Exception as error:  # its message may quote the URL, which has a password
        detail = f"EMENDER_DATABASE_URL is not a database URL ({type(error).__name__})."
        yield Finding("database", "failure", detail, "Write it as postgresql://user:password@host/database.")
        return
    try:
        with Session(engine) as session:
            version = session.scalar(text("SHOW server_version"))
            yield Finding("database", "ok", f"Postgres {version} is up.")
            yield from _schema_and_roles(session)
    except SQLAlchemyError as error:
        detail = f"The database is down or refused the connection ({type(getattr(error, 'orig', error)).__name__})."
        yield Finding("database", "failure", detail, "Check EMENDER_DATABASE_URL, the server, and the role's password.")
    finally:
        engine.dispose()


def _schema_and_roles(session: Session) -> Iterator[Finding]:
    try:
        newest = check_schema(session)
    except SchemaBehind as behind:
        yield Finding("schema", "failure", str(behind), "Run `emender migrate` as the role that owns the tables.")
        return
    if newest:
        yield Finding("schema", "ok", "All migrations of this version are applied.")
    else:
        yield Finding(
            "schema", "warning", "The schema is newer than this version.", "Install the version that migrated it."
        )
    yield _role(session)
    yield _clock(session)
    yield from _workers(session)


def _role(session: Session) -> Finding:
    role = session.scalar(text("SELECT current_user"))
    rights = text("SELECT has_table_privilege(:table, 'INSERT'), has_table_privilege(:table, 'UPDATE')")
    privileges = [session.execute(rights, {"table": table}).one() for table in (*APPEND_ONLY, *Base.metadata.tables)]
    if not all(insert for insert, _ in privileges):
        step = f"Run `emender migrate --service-role {role}` as the role that owns the tables."
        return Finding("role", "failure", f"The role {role} may not use all tables.", step)
    if any(update for _, update in privileges[: len(APPEND_ONLY)]):
        step = "Connect the service as another role: `emender migrate --service-role NAME`."
        return Finding("role", "warning", f"The role {role} may rewrite history; only a trigger prevents it.", step)
    return Finding("role", "ok", f"The role {role} may use the tables and cannot rewrite history.")


def _clock(session: Session) -> Finding:
    before = time.monotonic()
    database_time = session.scalars(text("SELECT clock_timestamp()")).one()
    round_trip = time.monotonic() - before
    skew = abs((datetime.now(UTC) - database_time).total_seconds())
    if skew > MAX_SKEW_SECONDS + round_trip:
        detail = f"This machine's clock and the database's are {skew:.0f} s apart."
        return Finding(
            "clock", "warning", detail, "Synchronize both by NTP: webhooks are signed with this machine's time."
        )
    return Finding("clock", "ok", f"The clock is within {MAX_SKEW_SECONDS:.0f} s of the database's.")


def _workers(session: Session) -> Iterator[Finding]:
    alive = workers.count_alive(session)
    count = sum(alive.values())
    if not count:
        yield Finding("workers", "warning", "No worker runs: jobs wait.", "Start one: `emender worker`.")
        return
    yield Finding("workers", "ok", f"{count} run.")
    others = {version: number for version, number in alive.items() if version != editing.__version__}
    if others:
        versions = ", ".join(f"{number} of {version}" for version, number in sorted(others.items()))
        detail = f"{versions}; this is {editing.__version__}."
        yield Finding("versions", "warning", detail, "Restart them with this version, or install theirs here.")
    else:
        yield Finding("versions", "ok", f"All workers run {editing.__version__}.")


def _redis(settings: Settings) -> Iterator[Finding]:
    if settings.redis_url is None:
        yield Finding("redis", "ok", "EMENDER_REDIS_URL is not set: workers poll Postgres.")
        return
    problem = ping(settings.redis_url.get_secret_value())
    if problem is None:
        yield Finding("redis", "ok", "Redis is up.")
    else:
        detail = f"Redis is down ({problem}): workers poll Postgres meanwhile."
        yield Finding("redis", "warning", detail, "Check EMENDER_REDIS_URL and the server.")


def _store(settings: Settings) -> Finding:
    where = str(settings.store or settings.store_dir)
    step = f"Give this user read and write access to {where}. `emender storage scrub` verifies all blobs."
    try:
        open_store(settings).probe()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return Finding("store", "failure", f"{where} cannot be written and read: {reason}.", step)
    return Finding("store", "ok", f"{where}: a blob was written, read and verified.")


def _disk(settings: Settings) -> Finding:
    folder = next(path for path in (settings.store_dir, *settings.store_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{free / 2**30:.1f} GiB are free at {folder}."
    if free < MIN_FREE_BYTES:
        return Finding("disk", "warning", detail, "Run `emender storage collect`, or enlarge the disk.")
    return Finding("disk", "ok", detail)


def _signing_key(settings: Settings) -> Finding:
    setting, embedded = settings.signing_key_file, settings.data_dir / "signing-key.pem"
    if setting is None:
        if not embedded.exists():
            detail = "EMENDER_SIGNING_KEY_FILE is not set. Workers need it to start; the API does not."
            return Finding("signing key", "warning", detail, "Run `emender signing-key create FILE` where workers run.")
        setting = embedded
    if setting == UNSIGNED:
        step = "Set EMENDER_SIGNING_KEY_FILE to a key, so that checkpoints can be verified."
        return Finding("signing key", "warning", "Checkpoints are published without a signature.", step)
    try:
        key = read_configured_key(setting)
    except SigningKeyUnusable as error:
        return Finding("signing key", "failure", error.detail, "`emender signing-key create FILE` creates one.")
    assert key is not None
    if _is_open(Path(setting)):
        detail = f"The file of the key {key.id} can be read by others."
        return Finding("signing key", "warning", detail, f"chmod 600 {setting}")
    return Finding("signing key", "ok", f"The key {key.id} is usable.")


def _webhook_secret_key(settings: Settings) -> Iterator[Finding]:
    file = settings.data_dir / "webhook-key"
    if file.exists() and _is_open(file):
        yield Finding("webhook key", "warning", f"{file} can be read by others.", f"chmod 600 {file}")
    elif settings.webhook_secret_key is None and not file.exists():
        yield Finding("webhook key", "ok", "It is not set: there are no webhooks.")
    else:
        yield Finding("webhook key", "ok", "It is set.")


def _is_open(file: Path) -> bool:
    return bool(file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def _model_roots(settings: Settings) -> Iterator[Finding]:
    for root in settings.model_roots:
        if not root.is_dir():
            step = "Create or mount the folder, or remove it from EMENDER_MODEL_ROOTS."
            yield Finding("model roots", "failure", f"{root} is not a folder.", step)
            continue
        found = len(list(root.glob("*/model_index.json")))
        yield Finding("model roots", "ok", f"{root} has {found} models.")


def _torch(settings: Settings) -> Finding:
    if find_spec("torch") is None:
        return Finding("torch", "ok", "torch is not installed: this machine can run the API, but no worker.")
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
        step = "Run workers on a machine with a GPU, except for toy models."
        return Finding("torch", "warning" if settings.device == "auto" else "ok", f"{found} computes on the CPU.", step)
    return Finding("torch", "ok", f"{found} computes on {torch.cuda.get_device_name(device)}.")
