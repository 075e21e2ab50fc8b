"""Folders for embedded Postgres servers in tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from app.local.embedded_postgres import EmbeddedPostgres, copy_template_cluster


@contextmanager
def server_folder() -> Iterator[Path]:
    """Yield a temporary folder that `nobody` can enter, who runs the server under root.

    Each pytest session that starts closes the folders of all sessions to other users, so `tmp_path` does not serve.
    """
    with TemporaryDirectory(prefix="emender-test-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


def initialize(folder: Path) -> Path:
    """Copy an initialized cluster into the data folder of an `EmbeddedPostgres`. The first call on a machine makes it.

    initdb takes a second, the copy a tenth of it.
    """
    template = Path(gettempdir()) / f"emender-test-template-{version('embedded-postgres')}-{os.geteuid()}"
    if not template.exists():
        with server_folder() as temporary:
            with EmbeddedPostgres(temporary / "template"):
                pass
            with suppress(OSError):  # another session was first
                (temporary / "template").rename(template)
    copy_template_cluster(template, folder)
    return folder
