"""Run a copy of `deploy/pull.py` as a machine of a fleet does, against a real server."""

import json
import os
import secrets
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.db.models import Model, ModelFile
from emender import Client, EmenderError
from tests.app.checkpoints.conftest import Service
from tests.app.cli.test_main import emender
from tests.deploy.conftest import Machine, Wire
from tests.patience import patience

WEIGHTS = "text_encoder/model.safetensors"
OWN = {"README.md", "adapters/lora.safetensors", "manifest.json", "model.sig", WEIGHTS}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("published")]
Move = Callable[[str], None]


@pytest.fixture
def published(service: Service) -> list[str]:
    """The commits of v1 (fox) and v2 (fox and owl); `production` at v1."""
    ids = [str(service.edit(source)) for source in ("fox", "owl")]
    made = [service.apply(edits=ids[:1], alias="production"), service.apply(edits=ids)]
    return [checkpoint["commit"] for checkpoint in made]


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + patience(60)
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_folder_follows_the_alias_and_rolls_back(
    machine: Machine, wire: Wire, service: Service, published: list[str], move: Move, base_folder: Path
) -> None:
    first, second = published
    code, event = machine.pull("--exit-code")
    assert (code, event.get("event"), event.get("commit"), event.get("previous")) == (10, "changed", first, None), event
    files = wire.files()
    assert len(files) == len(set(files)) == event["downloaded"]
    assert machine.current == first and machine.is_whole()
    unet = machine.folder / "current" / "unet" / "diffusion_pytorch_model.safetensors"
    assert unet.read_bytes() == (base_folder / "unet" / unet.name).read_bytes()
    assert stat.S_IMODE(unet.stat().st_mode) == 0o444

    unchanged = event | {"event": "unchanged", "downloaded": 0, "bytes": 0}
    assert machine.pull("--exit-code") == (0, unchanged)
    assert [path.partition("?")[0] for path, _ in wire.requests] == ["/api/models/emender/tiny/revision/production"]
    wire.requests.clear()

    # The next checkpoint: files that both share are one file, the others are downloaded
    move("v2")
    code, event = machine.pull()
    assert (code, event["commit"], event["previous"]) == (0, second, first)
    assert set(wire.files()) == OWN
    assert (machine.folder / second / "unet" / unet.name).stat().st_ino == unet.stat().st_ino
    assert event["bytes"] == sum((machine.folder / second / path).stat().st_size for path in OWN)

    # A rollback holds until the alias moves
    assert machine.pull("--rollback")[1]["commit"] == machine.current == first
    code, event = machine.pull()
    assert (code, event["event"], event["commit"]) == (0, "held", first)
    move("v1")
    assert machine.pull()[1]["event"] == "unchanged"
    assert machine.pull("--rollback")[1]["commit"] == second
    assert machine.pull("--rollback")[1]["commit"] == first  # the second rollback undoes the first: nothing is held
    move("v2")
    assert machine.pull()[1]["commit"] == machine.current == second
    assert set(wire.files()) == {"manifest.json", "model.sig"}  # every file of the manifest is there already

    # A missing file is repaired in place; a file that was added is an error
    (machine.folder / second / WEIGHTS).unlink()
    assert machine.pull("--check")[0] == 6
    wire.requests.clear()
    code, event = machine.pull()
    assert (code, event["event"], machine.is_whole()) == (0, "changed", True)
    assert set(wire.files()) == {WEIGHTS, "manifest.json", "model.sig"}
    (machine.folder / second / "manifest.json").unlink()
    (machine.folder / second / "manifest.json").write_text("{")
    assert machine.pull()[1]["event"] == "changed" and machine.is_whole()
    assert {path.name for path in (machine.folder / ".pull").iterdir()} == {"lock"}
    (machine.folder / second / "text_encoder" / "pytorch_model.bin").touch()
    code, event = machine.pull("--check")
    assert code == 6 and "pytorch_model.bin: unexpected" in event["detail"]
    (machine.folder / second / "text_encoder" / "pytorch_model.bin").unlink()

    # Each refusal has its exit code, and changes nothing
    third = service.apply(edits=[service.get("/v1/models/tiny/checkpoints/v2")["edits"][1]["id"]])["commit"]
    assert machine.pull("--revision", "v9")[0] == 5
    assert machine.pull(EMENDER_API_KEY="em_0_0")[0] == 4
    reason = {"reason": "draws the wrong flag"}
    service.client.post("/v1/models/tiny/checkpoints/v2/retract", json=reason, headers=service.keys["admin"])
    code, event = machine.pull()
    assert (code, event["code"], machine.current) == (5, 5, second)
    assert "retracted" in event["detail"]
    (machine.folder / "new").mkdir()
    blocked = machine.folder / "new" / "file"
    blocked.touch()
    assert machine.pull("--folder", str(blocked), "--revision", "v1")[0] == 7

    # --keep deletes the oldest
    move("v3")
    assert machine.pull("--keep", "2")[1]["commit"] == third
    kept = {path.name for path in machine.folder.iterdir() if len(path.name) == 40}
    assert kept == {third, second}
    assert machine.is_whole()


def test_nothing_altered_or_cut_or_killed_becomes_current(
    machine: Machine, wire: Wire, published: list[str], tmp_path: Path, move: Move
) -> None:
    for name in ("model.sig", "manifest.json", WEIGHTS):
        shutil.rmtree(machine.folder, ignore_errors=True)
        wire.tamper = f"/{name}"
        code, event = machine.pull()
        assert (code, event["error"]) == (6, "unverified"), event
        assert name in event["detail"]
        assert not (machine.folder / "current").exists()
    wire.tamper = ""
    wire.requests.clear()

    # Only the altered file is downloaded again, also if the connection breaks
    wire.cut[WEIGHTS] = 1000
    assert machine.pull()[0] == 0
    assert wire.files() == [WEIGHTS, WEIGHTS]
    assert machine.current == published[0] and machine.is_whole()

    from app.signing.keys import create_key

    machine.key.with_name("other.pem").write_text(create_key(tmp_path / "other-private.pem").public_pem)
    move("v2")
    done = machine.start("--unsigned", "--key", str(machine.key.with_name("other.pem")))
    assert "not allowed with argument" in done.communicate()[1] and done.returncode == 2
    right, machine.key = machine.key, machine.key.with_name("other.pem")
    code, event = machine.pull()
    assert code == 6 and "trusted keys are" in event["detail"]
    machine.key = right
    shutil.rmtree(machine.folder / ".pull" / published[1])

    # Killed in the middle of the weights: the other files are kept, the weights are downloaded from their start
    wire.stall[WEIGHTS] = 1000
    process = machine.start()
    assert wire.stalled.wait(patience(60))
    staged = machine.folder / ".pull" / published[1]
    assert soon(lambda: all((staged / path).exists() for path in OWN - {WEIGHTS}))
    assert machine.pull()[0] == 8  # while the first one works
    process.kill()
    process.communicate()
    assert machine.current == published[0] and machine.is_whole()
    assert list(staged.rglob("*.incomplete"))
    wire.stall.clear()
    wire.ended.set()
    wire.requests.clear()
    assert machine.pull()[0] == 0
    downloads = [
        (path.partition(published[1] + "/")[2], ranged) for path, ranged in wire.requests if "/resolve/" in path
    ]
    assert downloads == [(WEIGHTS, None)]
    assert machine.current == published[1] and machine.is_whole()
    assert not list(machine.folder.rglob("*.incomplete")) and not staged.exists()

    # A damaged file that both checkpoints share is downloaded again, and only once
    shared = machine.folder / published[0] / "unet" / "diffusion_pytorch_model.safetensors"
    shared.chmod(0o644)
    content = bytearray(shared.read_bytes())
    content[-1] ^= 1
    shared.write_bytes(content)
    assert machine.pull("--check")[0] == 6
    wire.requests.clear()
    assert machine.pull()[0] == 0
    assert sorted(wire.files()) == ["manifest.json", "model.sig", "unet/diffusion_pytorch_model.safetensors"]
    assert machine.current == published[1] and machine.is_whole()

    wire.url = machine.url = "http://127.0.0.1:9"
    started = time.monotonic()
    code, event = machine.pull()
    assert (code, event["error"]) == (3, "unreachable") and machine.url in event["detail"]
    assert time.monotonic() - started < patience(110)


def test_an_unsigned_pull_compares_files_with_the_manifest(machine: Machine, wire: Wire, published: list[str]) -> None:
    wire.tamper = f"/{WEIGHTS}"
    code, event = machine.pull("--unsigned")
    assert code == 6 and f"{WEIGHTS}: altered" in event["detail"]
    wire.tamper = ""
    code, event = machine.pull("--unsigned")
    assert (code, event["commit"], event["key"]) == (0, published[0], None)
    assert machine.is_whole()


def test_a_large_file_is_resumed_and_a_moving_alias_changes_nothing_midway(
    machine: Machine, wire: Wire, service: Service, move: Move
) -> None:
    content = secrets.token_bytes(100 * 10**6)
    with service.sessions() as session:
        model = session.get_one(Model, service.model.id)
        model.files.append(ModelFile(path="unet/big.bin", sha256=service.store.put(content), size=len(content)))
        session.commit()
    one, two = (str(service.edit(source)) for source in ("jay", "elk"))
    first = service.apply(edits=[one], alias="production")["commit"]
    second = service.apply(edits=[one, two])["commit"]
    wire.cut["unet/big.bin"] = 40 * 10**6
    wire.pause = WEIGHTS
    process = machine.start()
    assert wire.stalled.wait(patience(120))
    move("v4")
    wire.ended.set()
    out, _ = process.communicate(timeout=patience(240))
    assert process.returncode == 0, out
    assert machine.current == first and machine.is_whole()
    assert (machine.folder / "current" / "unet" / "big.bin").read_bytes() == content
    whole, resumed = (ranged for path, ranged in wire.requests if path.endswith("big.bin"))
    assert whole is None and resumed is not None  # huggingface_hub writes pieces of 10 MiB
    assert 30 * 10**6 <= int(resumed.removeprefix("bytes=").removesuffix("-")) <= 40 * 10**6
    wire.pause = ""
    assert machine.pull()[1]["commit"] == machine.current == second


def test_watch_follows_the_alias_and_runs_the_command_for_each_checkpoint(
    machine: Machine, published: list[str], move: Move, tmp_path: Path
) -> None:
    """The command runs until it succeeds once. No secret is on a command line."""
    told = tmp_path / "told"
    script = tmp_path / "tell.sh"
    script.write_text(f'echo "$EMENDER_COMMIT ${{EMENDER_API_KEY:-none}}" >> {told}; test -e {told}.ok\n')
    process = machine.start("--watch", "0.2", "--on-change", f"sh {script}")
    try:
        assert soon(lambda: told.exists() and told.read_text().count("\n") >= 2)  # it failed, and is run again
        Path(f"{told}.ok").touch()
        move("v2")
        assert soon(lambda: machine.current == published[1] and published[1] in told.read_text())
        command = Path(f"/proc/{process.pid}/cmdline")
        if command.exists():
            assert machine.environment["EMENDER_API_KEY"].encode() not in command.read_bytes()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=patience(30))
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["commit"] for event in events if event["event"] == "changed"] == published
    assert {event["error"] for event in events if event["event"] == "error"} == {"command_failed"}
    lines = told.read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"none"}  # the command is given no key
    assert lines.count(f"{published[1]} none") == 1
    assert os.readlink(machine.folder / "previous") == published[0]


def test_the_command_and_the_client_pull_the_same_files(
    machine: Machine, wire: Wire, published: list[str], tmp_path: Path
) -> None:
    """`emender checkpoints pull` has the layout of pull.py; the client's `pull` fills one folder."""
    token = machine.environment["EMENDER_API_KEY"]
    given = {"EMENDER_URL": wire.url, "EMENDER_API_KEY": token}
    command = ["checkpoints", "pull", "tiny", "production", "--folder", str(machine.folder), "--exit-code"]
    done = emender(*command, "--key", str(machine.key), **given)
    assert (done.returncode, machine.current, machine.is_whole()) == (10, published[0], True), done.stderr
    assert f"{published[0]} changed" in done.stdout
    assert emender(*command, **given).returncode == 2  # neither a key nor --unsigned
    checked = emender(*command, "--key", str(machine.key), "--check")
    assert (checked.returncode, checked.stderr) == (0, "")

    # From the server itself
    with Client(f"http://127.0.0.1:{wire.port}", api_key=token) as client:
        assert client.checkpoints.pull("tiny", "v1", tmp_path / "flat").commit == published[0]
        (tmp_path / "flat" / "unet" / "diffusion_pytorch_model.bin").touch()
        with pytest.raises(EmenderError, match="does not have: unet/diffusion_pytorch_model.bin"):
            client.checkpoints.pull("tiny", "v1", tmp_path / "flat")
