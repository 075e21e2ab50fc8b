"""The benchmark of pulls with a small file, against a real nginx."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import pull

TINY = ["--megabytes", "1", "--clients", "1", "3", "--pulls", "3", "--repeats", "1"]


@pytest.mark.skipif(shutil.which("nginx", path=pull.PROGRAMS) is None, reason="needs nginx")
def test_one_command_gives_a_table_a_file_and_a_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pull.main([*TINY, "--json", str(tmp_path / "figures.json")]) == 0
    printed = capfd.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads((tmp_path / "figures.json").read_text())
    assert "Pulls" in printed
    assert [(row["clients"], row["pulls"]) for row in last["rows"]] == [(1, 3), (3, 3)]
    assert last["ratio"] == last["rows"][-1]["ratio"] > 0
    for side in (last["first"], *(row[name] for row in last["rows"] for name in ("ours", "nginx"))):
        assert side["bytes_per_second"] > 0 and side["rss_peak"] > 0


def test_without_nginx_it_says_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pull, "PROGRAMS", str(tmp_path))
    assert pull.main(TINY) == 1
    assert "install it (apt-get install nginx-light)" in capsys.readouterr().err


def test_other_bytes_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compare(*_: object) -> None:
        raise pull.Unlike("the API sent other bytes than the file's")

    monkeypatch.setattr(pull, "compare", compare)
    assert pull.main(TINY) == 1
    assert "other bytes" in capsys.readouterr().err
