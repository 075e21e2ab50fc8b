"""The sync client is written from the async client."""

from pathlib import Path

import emender
from client.generate_sync import generate

SYNC = Path(emender.__file__).parent / "_sync"


def test_sync_client_is_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    assert written == {path.name: path.read_text() for path in SYNC.glob("*.py")}, "run `make sync-client`"
