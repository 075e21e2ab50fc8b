"""`deploy/pull.py` as a machine of a fleet runs it, against a real server: what comes, is refused, is kept."""

import json
import os
import secrets
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

WEIGHTS = "text_encoder/model.safetensors"
OWN = {"README.md", "adapters/lora.safetensors", "manifest.json", "manifest.sig", WEIGHTS}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("published")]
Move = Callable[[str], None]


@pytest.fixture
def published(service: Service) -> list[str]:
    """The commits of v1 (fox) and v2 (fox and owl); `production` at v1."""
    ids = [str(service.edit(source)) for source in ("fox", "owl")]
    made = [service.apply(edits=ids[:1], alias="production"), service.apply(edits=ids)]
    return [checkpoint["commit"] for checkpoint in made]


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_life_of_a_folder(
    machine: Machine, wire: Wire, service: Service, published: list[str], move: Move, base_folder: Path
) -> None:
    first, second = published
    code, event = machine.pull("--exit-code")
    assert (code, event.get("commit"), event.get("previous")) == (10, first, None), event
    files = wire.files()
    assert len(files) == len(set(files)) == event["downloaded"] + 2  # and the manifest with its signature
    assert machine.current == first and machine.problems() == {}
    unet = machine.folder / "current" / "unet" / "diffusion_pytorch_model.safetensors"
    assert unet.read_bytes() == (base_folder / "unet" / unet.name).read_bytes()
    assert stat.S_IMODE(unet.stat().st_mode) == 0o444

    assert machine.pull("--exit-code") == (
        0,
        event | {"event": "unchanged", "changed": False, "downloaded": 0, "received": 0},
    )
    assert [path for path, _ in wire.seen] == ["/api/models/emender/tiny/revision/production"]
    wire.seen.clear()

    # Another version: what it does not share is downloaded, the rest is the same file
    move("v2")
    code, event = machine.pull()
    assert (code, event["commit"], event["previous"]) == (0, second, first)
    assert set(wire.files()) == OWN
    assert (machine.folder / second / "unet" / unet.name).stat().st_ino == unet.stat().st_ino
    sizes = {path: (machine.folder / second / path).stat().st_size for path in OWN - {"manifest.json", "manifest.sig"}}
    assert event["received"] == sum(sizes.values())

    # Back, and it stays back until the alias says something else; then on
    assert machine.pull("--rollback")[1]["commit"] == machine.current == first
    code, event = machine.pull()
    assert (code, event["event"], event["commit"]) == (0, "held", first)
    move("v1")
    assert machine.pull()[1]["event"] == "unchanged"
    move("v2")
    assert machine.pull()[1]["commit"] == machine.current == second
    assert set(wire.files()) == {"manifest.json", "manifest.sig"}  # every blob is there already

    # A damaged file is mended in place; one that nobody listed is complained of
    (machine.folder / second / WEIGHTS).unlink()
    assert machine.pull("--check")[0] == 6
    code, event = machine.pull()
    assert (code, event["changed"], event["downloaded"], machine.problems()) == (0, True, 1, {})
    (machine.folder / second / "text_encoder" / "pytorch_model.bin").touch()
    code, event = machine.pull("--check")
    assert code == 6 and "pytorch_model.bin: unlisted" in event["detail"]
    (machine.folder / second / "text_encoder" / "pytorch_model.bin").unlink()

    # What is refused has a code of its own, and changes nothing
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

    # Only so many versions are kept
    move("v3")
    assert machine.pull("--keep", "2")[1]["commit"] == third
    kept = {path.name for path in machine.folder.iterdir() if len(path.name) == 40}
    assert kept == {third, second}
    assert machine.problems() == {}


def test_what_is_done_on_the_way(
    machine: Machine, wire: Wire, published: list[str], tmp_path: Path, move: Move
) -> None:
    """Tampered with, signed by another, cut, killed: `current` stays, and the next run goes on."""
    for name in (WEIGHTS, "manifest.json", "manifest.sig"):
        wire.tamper = f"/{name}"
        code, event = machine.pull()
        assert (code, event["error"]) == (6, "verification failed"), event
        assert not (machine.folder / "current").exists()
    wire.tamper = ""
    wire.seen.clear()

    wire.cut[WEIGHTS] = 1000
    assert machine.pull()[0] == 0
    assert [ranged for path, ranged in wire.seen if path.endswith(WEIGHTS)] == [None, "bytes=1000-"]
    assert machine.current == published[0] and machine.problems() == {}

    from app.signing.keys import create_key

    machine.key.with_name("other.pem").write_text(create_key(tmp_path / "other-private.pem").public_pem)
    move("v2")
    other = ["--key", str(machine.key.with_name("other.pem"))]
    code, event = machine.pull("--unsigned", *other)
    assert code == 2
    right, machine.key = machine.key, machine.key.with_name("other.pem")
    code, event = machine.pull()
    assert code == 6 and "trusted are" in event["detail"]
    machine.key = right

    # Killed after 1000 bytes of the weights: those are not asked for again
    wire.stall[WEIGHTS] = 1000
    process = machine.start()
    assert wire.stalled.wait(60)
    part = machine.folder / ".pull" / f"{_sha256(machine.folder / '.pull' / published[1])}.part"
    assert soon(lambda: part.exists() and part.stat().st_size > 0)
    assert machine.pull()[0] == 8  # while the first one works
    process.kill()
    process.communicate()
    assert machine.current == published[0] and machine.problems() == {}
    have = part.stat().st_size
    wire.stall.clear()
    wire.ended.set()
    wire.seen.clear()
    assert machine.pull()[0] == 0
    assert [ranged for path, ranged in wire.seen if path.endswith(WEIGHTS)] == [f"bytes={have}-"]
    assert machine.current == published[1] and machine.problems() == {}
    assert not list((machine.folder / ".pull").glob("*.part"))

    # Part of another file, by a bad disk perhaps: begun again
    move("v1")
    (machine.folder / published[0] / WEIGHTS).unlink()
    part.with_name(f"{_sha256(machine.folder / published[0])}.part").write_bytes(b"not the beginning")
    assert machine.pull()[0] == 0
    assert machine.current == published[0] and machine.problems() == {}

    wire.url = machine.url = "http://127.0.0.1:9"
    started = time.monotonic()
    assert machine.pull()[0] == 3
    assert time.monotonic() - started < 110


def test_a_large_file_and_an_alias_that_moves(machine: Machine, wire: Wire, service: Service, move: Move) -> None:
    """100 MB, broken off on the way, are whole in the end; what began with one version ends with it."""
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
    assert wire.stalled.wait(120)
    move("v4")
    wire.ended.set()
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert machine.current == first and machine.problems() == {}
    assert (machine.folder / "current" / "unet" / "big.bin").read_bytes() == content
    assert [ranged for path, ranged in wire.seen if path.endswith("big.bin")] == [None, "bytes=40000000-"]
    wire.pause = ""
    assert machine.pull()[1]["commit"] == machine.current == second


def _sha256(version: Path) -> str:
    """Of the weights, as the manifest there says."""
    manifest = json.loads((version / "manifest.json").read_bytes())
    sha256: str = manifest["files"][WEIGHTS]
    return sha256


def test_watch(machine: Machine, published: list[str], move: Move, tmp_path: Path) -> None:
    """It follows the alias and tells by a command, at least once for each version; no secret is on a command line."""
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
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["commit"] for event in events if event["event"] == "changed"] == published
    assert {event["error"] for event in events if event["event"] == "error"} == {"command failed"}
    lines = told.read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"none"}  # the command is given no key
    assert lines.count(f"{published[1]} none") == 1
    assert os.readlink(machine.folder / "previous") == published[0]


def test_the_same_by_the_command_and_the_client(
    machine: Machine, wire: Wire, published: list[str], tmp_path: Path
) -> None:
    """`emender checkpoints pull` into the same layout; the client's into one folder, verified."""
    token = machine.environment["EMENDER_API_KEY"]
    given = {"EMENDER_URL": wire.url, "EMENDER_API_KEY": token}
    command = ["checkpoints", "pull", "tiny", "production", "--folder", str(machine.folder), "--exit-code"]
    done = emender(*command, "--key", str(machine.key), **given)
    assert (done.returncode, machine.current, machine.problems()) == (10, published[0], {}), done.stderr
    assert f"{published[0]} changed" in done.stdout
    assert emender(*command, **given).returncode == 2  # neither a key nor --unsigned
    checked = emender(*command, "--key", str(machine.key), "--check")
    assert (checked.returncode, checked.stderr) == (0, "")

    # huggingface_hub asks by HEAD too, which the wire does not take: of the server itself
    with Client(f"http://127.0.0.1:{wire.port}", api_key=token) as client:
        assert client.checkpoints.pull("tiny", "v1", tmp_path / "flat").commit == published[0]
        (tmp_path / "flat" / "unet" / "diffusion_pytorch_model.bin").touch()
        with pytest.raises(EmenderError, match="does not have: unet/diffusion_pytorch_model.bin"):
            client.checkpoints.pull("tiny", "v1", tmp_path / "flat")
