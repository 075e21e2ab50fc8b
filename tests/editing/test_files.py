from pathlib import Path

import pytest

from editing.files import write_atomically


def test_write_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"old")
    write_atomically(tmp_path / "weights", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("weights", b"new")]


def test_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"old")

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "weights", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("weights", b"old")]
