"""The benchmark of the service with few rows and clients, against a real wrk, nginx and Postgres."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import pull, service

TINY = ["--rows", "20", "600", "--clients", "3", "--seconds", "1", "--repeats", "1", "--megabytes", "0.1"]
ROW = {"requests_per_second": 10.0, "bytes_per_second": 1e4, "p50_ms": 1.0, "p99_ms": 2.0}
ROW |= {"cpu_ms": 1.0, "requests": 10, "errors": 0}
INSTALLED = shutil.which("wrk") and shutil.which("nginx", path=pull.PROGRAMS)


def rows() -> list[dict[str, object]]:
    cases = [*(f"list, {name}" for name in service.LISTS), "post", "pull"]
    return [{"case": case, "side": side, **ROW} for case in cases for side in ("one", "other")]


@pytest.mark.skipif(not INSTALLED, reason="needs wrk and nginx")
@pytest.mark.long
def test_one_command_gives_a_table_a_file_and_a_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert service.main([*TINY, "--json", str(tmp_path / "figures.json")]) == 0
    printed = capfd.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads((tmp_path / "figures.json").read_text())
    assert "Service, 3 clients" in printed and last["errors"] == 0
    asked = {(row["case"], row["side"]) for row in last["rows"]}
    assert asked >= {
        ("post", "bare"),
        ("post", "ours, once"),
        ("post", "ours"),
        ("checkpoint", "ours"),
        ("pull", "nginx"),
        ("pull", "ours"),
    }
    assert {row["edits"] for row in last["rows"] if row["case"] == "list, of a key"} == {20, 600}
    assert all(row["requests"] > 0 for row in last["rows"])


def test_ratios_are_of_the_last_over_the_first() -> None:
    measured = rows()
    measured[1]["p99_ms"], measured[-1]["requests_per_second"] = 3.0, 5.0
    found = service.ratios(measured)
    assert (found["list_ratio"], found["worst_list_ratio"]) == (1.5, 1.5)
    assert (found["post_ratio"], found["pull_ratio"]) == (1.0, 0.5)


def test_a_request_that_is_refused_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        service, "measure", lambda chosen, folder: [*rows(), {"case": "post", **rows()[0], "errors": 2}]
    )
    assert service.main(TINY) == 1
    assert "2 requests were not answered with 2xx" in capsys.readouterr().err


def test_without_wrk_it_says_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert service.main(TINY) == 1
    assert "install it (apt-get install wrk)" in capsys.readouterr().err
