"""`python -m tests.faults.dying_worker STEP`: a worker that ends by `kill -9` at one step of its first publication."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from sqlalchemy import event

from app.checkpoints import publish
from app.storage import local
from app.storage.store import Store, read_chunks
from app.worker.main import main
from app.worker.tasks import build_checkpoint

STEPS = ("write", "fsync", "rename", "manifest", "rows", "alias", "commit", "committed")


def die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def replace(module: ModuleType, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, function)


def die_after(place: Any, name: str) -> None:
    whole = getattr(place, name)

    def last(*arguments: Any, **options: Any) -> None:
        whole(*arguments, **options)
        die()

    setattr(place, name, last)


def read_half(file: BinaryIO) -> Iterator[bytes]:
    chunk = next(read_chunks(file))
    yield chunk[: len(chunk) // 2]
    die()


def arm(step: str) -> None:
    """Die at the chosen step of a publication.

    The steps: writing the first blob, its fsync, its rename, the manifest, the rows, the alias, and before and after
    the commit."""
    match step:
        case "write":
            replace(local, "read_chunks", read_half)
        case "fsync":
            os.fsync = die
        case "rename":
            os.replace = die
        case "manifest":
            replace(build_checkpoint, "_write_metadata_files", die)
        case "rows":
            replace(publish, "move_requested_alias", die)
        case "alias":
            die_after(publish, "move_requested_alias")
        case "commit":
            replace(build_checkpoint, "request_check", die)
        case "committed":
            replace(build_checkpoint, "request_check", lambda session, **_: event.listen(session, "after_commit", die))


def main_until(step: str) -> None:
    store_folder = vars(build_checkpoint)["store_folder"]

    def armed(store: Store, folder: Path) -> Any:
        arm(step)
        return store_folder(store, folder)

    replace(build_checkpoint, "store_folder", armed)
    main()


if __name__ == "__main__":
    main_until(sys.argv[1])
