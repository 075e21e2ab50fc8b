"""The commands of the client, against the application of the tests and a worker."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from click.testing import Result
from pydantic import SecretStr
from typer.testing import CliRunner

import editing
from app.cli.main import build_command
from app.worker.claims import claim_delivery
from emender import Client
from emender.cli import main as cli
from emender.cli.console import read_api_key
from emender.cli.errors import CommandError, ExitCode
from tests.app.checkpoints.conftest import Service, base_folder, service
from tests.patience import patience

__all__ = ["base_folder", "service"]


def run_emender(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with only these settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    command = [sys.executable, "-m", "emender", *arguments]
    return subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=patience(120), check=False
    )


def last_line(done: Any) -> list[str]:
    """Split the last line of the output; lines of the worker's log come before it."""
    words: list[str] = done.output.splitlines()[-1].split()
    return words


def code(done: Any) -> int:
    """Find the exit code that the process would have."""
    return done.exception.code if isinstance(done.exception, CommandError) else done.exit_code


def as_json(done: Any) -> Any:
    return json.loads(done.output.splitlines()[-1])


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command against the service with a key that has a scope."""

    def invoke(*arguments: str, scope: str = "admin") -> Any:
        token = service.keys[scope]["Authorization"].removeprefix("Bearer ")

        def connect(**options: Any) -> Client:
            return Client("http://testserver", api_key=token, transport=service.client._transport, **options)

        monkeypatch.setattr("emender.cli.console.create_client", connect)
        stopping = threading.Event()

        def work() -> None:
            while not stopping.wait(0.05):
                service.runner.work()

        worker = threading.Thread(target=work)
        if "--wait" in arguments or "watch" in arguments:
            worker.start()
        try:
            return CliRunner().invoke(build_command(), arguments, catch_exceptions=True)
        finally:
            stopping.set()
            if worker.ident:
                worker.join()

    return invoke


class TestProcess:
    def test_no_command_imports_the_service_at_its_start(self) -> None:
        heavy = ("torch", "transformers", "diffusers", "fastapi", "pyarrow", "sqlalchemy")
        code = f"import sys, emender.cli.main as m; m.load_commands(); sys.exit(sum(n in sys.modules for n in {heavy}))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_missing_api_key_is_an_error(self, tmp_path: Path) -> None:
        done = run_emender("checkpoints", "list", "tiny", EMENDER_DATA_DIR=str(tmp_path))
        assert (done.returncode, done.stdout) == (ExitCode.UNAUTHORIZED, "")
        assert "EMENDER_API_KEY" in done.stderr
        assert "Traceback" not in done.stderr

    def test_service_that_does_not_respond_is_an_error(self) -> None:
        done = run_emender("checkpoints", "list", "tiny", EMENDER_URL="http://127.0.0.1:9", EMENDER_API_KEY="em_a_b")
        assert done.returncode == ExitCode.UNREACHABLE
        assert "No response from http://127.0.0.1:9" in done.stderr

    def test_api_key_is_read_from_the_secrets_of_a_container(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "emender_api_key").write_text("em_a_b\n")
        monkeypatch.setattr("emender.cli.console.SECRETS", tmp_path)
        monkeypatch.delenv("EMENDER_API_KEY", raising=False)
        assert read_api_key() == "em_a_b"

    def test_api_key_of_the_embedded_service_is_the_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "admin-key").write_text("em_c_d\n")
        monkeypatch.setenv("EMENDER_DATA_DIR", str(tmp_path))
        monkeypatch.delenv("EMENDER_API_KEY", raising=False)
        assert read_api_key() == "em_c_d"

    def test_file_that_cannot_be_written_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        def write() -> None:
            Path("/none/value.safetensors").write_bytes(b"")

        with pytest.raises(SystemExit) as ended:
            cli.run(cast(typer.Typer, write))
        assert ended.value.code == ExitCode.DISK
        assert capsys.readouterr().err == "/none/value.safetensors: No such file or directory.\n"


class TestCommands:
    def test_apply_waits_for_the_checkpoint(self, run: Callable[..., Result], service: Service) -> None:
        edit = service.edit("fox")
        done = run("apply", "tiny", "--edit", str(edit), "--alpha", "0.6", "--alias", "staging", "--wait")
        assert done.exit_code == 0, done.output
        checkpoint = service.get("/v1/models/tiny/checkpoints/v1")
        assert f"v1 published {checkpoint['commit']}" in done.output
        assert (checkpoint["alpha"], checkpoint["aliases"]) == (0.6, ["staging"])
        listed = run("checkpoints", "list", "tiny")
        assert "v1" in listed.output and "staging" in listed.output

    def test_dry_run_shows_the_plan_and_creates_nothing(self, run: Callable[..., Result], service: Service) -> None:
        old, new = service.edit("fox"), service.edit("fox")
        done = run("apply", "tiny", "--dry-run")
        assert done.exit_code == 0
        assert f"{new}  fox" in done.output
        assert f"{old}  left out" in done.output
        assert service.get("/v1/models/tiny/checkpoints")["items"] == []

    def test_rejected_request_names_the_field(self, run: Callable[..., Result], service: Service) -> None:
        service.edit("fox")
        done = run("apply", "tiny", "--alpha", "1")
        assert code(done) == ExitCode.REJECTED
        assert str(done.exception).splitlines()[0].startswith("Invalid request (422): ")
        assert "  /alpha: " in str(done.exception)

    def test_failed_build_is_an_error(
        self, run: Callable[..., Result], service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.edit("fox")
        monkeypatch.setattr("app.worker.tasks.build_checkpoint.write_card", lambda *_, **__: 1 / 0)
        done = run("apply", "tiny", "--wait")
        assert str(done.exception).startswith("v1 failed: ")
        assert code(done) == ExitCode.FAILED

    def test_edit_is_created_with_settings(self, run: Callable[..., Result], service: Service) -> None:
        done = run(
            "edits",
            "create",
            "tiny",
            "fox",
            "--destination",
            "owl",
            "--objective",
            "text",
            "--optimization-steps",
            "3",
            "--num-inference-steps",
            "8",
            "--guidance-scale",
            "0",
            "--wait",
        )
        assert done.exit_code == 0, done.output
        edit_id, state = last_line(done)
        assert state == "ready"
        edit = service.get(f"/v1/edits/{edit_id}")
        assert (edit["source"], edit["destination"]) == ("fox", {"prompt": "owl"})
        settings = edit["settings"]
        assert (settings["optimization_steps"], settings["num_inference_steps"], settings["guidance_scale"]) == (
            3,
            8,
            0,
        )

    def test_edit_by_images_and_erasure_is_created(
        self, run: Callable[..., Result], service: Service, tmp_path: Path
    ) -> None:
        from PIL import Image

        Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
        done = run("edits", "create", "tiny", "fox", "--image", str(tmp_path / "red.png"), "--template", "a {}")
        assert done.exit_code == 0, done.output
        edit = service.get(f"/v1/edits/{last_line(done)[0]}")
        assert edit["destination"]["images"][0].startswith("sha256:")
        assert edit["templates"] == ["a {}"]
        done = run("edits", "create", "tiny", "Monet", "--erase", "--neutral", "art", "--reason", "LEGAL-7")
        edit = service.get(f"/v1/edits/{last_line(done)[0]}")
        assert edit["destination"] == {"erase": True, "neutral": "art"}
        assert edit["reason"] == "LEGAL-7"

    @pytest.mark.parametrize("destination", [[], ["--destination", "owl", "--erase"]])
    def test_edit_needs_exactly_one_destination(self, run: Callable[..., Result], destination: Any) -> None:
        done = run("edits", "create", "tiny", "fox", *destination)
        assert code(done) == ExitCode.USAGE

    def test_failed_registration_is_an_error(self, run: Callable[..., Result]) -> None:
        done = run("models", "register", "other", "nowhere", "--wait")
        assert str(done.exception).startswith("other failed: ")
        assert "nowhere" in str(done.exception)
        done = run("models", "register", "third", "../etc")
        assert "  /source: " in str(done.exception)

    def test_webhooks_are_created_changed_and_deleted(self, run: Callable[..., Result], service: Service) -> None:
        service.settings.webhook_secret_key = SecretStr("k" * 40)
        url = "https://deploy.example/emender"
        made = as_json(run("webhooks", "create", url, "--event", "alias.moved", "--event", "edit.ready", "--json"))
        assert made["secret"].startswith("whsec_") and made["events"] == ["alias.moved", "edit.ready"]
        done = run("webhooks", "create", url, "--event", "edit.failed", "--description", "told of failures")
        assert last_line(done)[0].startswith("whsec_")
        (second, first) = as_json(run("webhooks", "list", "--json"))
        assert (first["id"], second["description"]) == (made["id"], "told of failures") and "secret" not in first
        (rotated,) = last_line(run("webhooks", "rotate", made["id"]))
        assert rotated.startswith("whsec_") and rotated != made["secret"]
        run("webhooks", "update", made["id"], "--disable", "--event", "checkpoint.published")
        changed = service.client.get(f"/v1/webhooks/{made['id']}", headers=service.keys["admin"]).json()
        assert (changed["enabled"], changed["events"]) == (False, ["checkpoint.published"])
        assert "disabled" in str(run("webhooks", "test", made["id"]).exception)
        assert run("webhooks", "update", made["id"], "--enable").output.endswith("enabled\n")
        assert run("webhooks", "delete", second["id"]).exit_code == 0
        assert [item["id"] for item in as_json(run("webhooks", "list", "--json"))] == [made["id"]]
        assert code(run("webhooks", "create", url)) == ExitCode.USAGE
        assert made["id"] in run("webhooks", "list").output
        assert code(run("webhooks", "list", scope="read")) == ExitCode.UNAUTHORIZED

    def test_webhook_deliveries_are_listed_and_repeated(
        self, run: Callable[..., Result], service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.settings.webhook_secret_key = SecretStr("k" * 40)
        made = as_json(run("webhooks", "create", "https://a.invalid/", "--event", "alias.moved", "--json"))

        def nowhere(host: str, port: int) -> list[str]:
            raise OSError("no such name")

        monkeypatch.setattr("app.webhooks.connect.resolve", nowhere)
        monkeypatch.setattr(service.runner, "claim", claim_delivery)  # it works while the command sleeps
        tried = run("webhooks", "test", made["id"], "--wait")
        assert tried.exit_code == 1 and "a.invalid cannot be resolved" in tried.output
        (sent,) = as_json(run("webhooks", "deliveries", made["id"], "--json"))
        assert (sent["event"], sent["tries"]) == ("webhook.ping", 1)
        again = as_json(run("webhooks", "redeliver", made["id"], sent["id"], "--json"))
        assert again["message_id"] == sent["message_id"] and again["id"] != sent["id"]
        assert sent["id"] in run("webhooks", "deliveries", made["id"]).output
        monkeypatch.setattr("emender.cli.webhooks.PING_TIMEOUT_SECONDS", 0.0)
        unsent = run("webhooks", "test", made["id"], "--wait")
        assert "EMENDER_WEBHOOK_SECRET_KEY" in str(unsent.exception)

    def test_license_is_registered(self, run: Callable[..., Result], service: Service) -> None:
        given = ["--license", "other", "--license-name", "own", "--license-link", "https://a.example"]
        run("models", "register", "licensed", "nowhere", *given)
        license = {"id": "other", "name": "own", "link": "https://a.example"}
        assert service.get("/v1/models/licensed")["license"] == license
        assert "--license" in str(run("models", "register", "fourth", "nowhere", "--license-name", "own").exception)

    def test_statistics_are_estimated_over_a_column_of_a_file(
        self, run: Callable[..., Result], service: Service, tmp_path: Path
    ) -> None:
        captions = [f"a picture of thing {n}" for n in range(80)]
        (tmp_path / "set.csv").write_text("id,alt\n" + "".join(f"{n},{line}\n" for n, line in enumerate(captions)))
        done = run(
            "statistics", "create", "tiny", str(tmp_path / "set.csv"), "--column", "alt", "--samples", "70", "--wait"
        )
        assert done.exit_code == 0, done.output
        statistics_id, state, digest = last_line(done)
        made = service.get(f"/v1/models/tiny/statistics/{statistics_id}")
        assert (made["state"], made["captions"], made["digest"], state) == ("ready", 70, digest, "ready")
        encoder = service.runner.context.pipelines.get(service.model.id).encoder
        assert digest == editing.estimate_second_moments(encoder, captions[:70]).digest

    def test_file_without_captions_is_an_error(self, run: Callable[..., Result], tmp_path: Path) -> None:
        (tmp_path / "set.csv").write_text("id,title\n1,a cat\n")
        done = run("statistics", "create", "tiny", str(tmp_path / "set.csv"))
        assert "set.csv, line 1: there is no column 'caption' or 'text'" in str(done.exception)
        (tmp_path / "set.txt").write_text("\n")
        done = run("statistics", "create", "tiny", str(tmp_path / "set.txt"))
        assert str(done.exception) == "set.txt has no captions."

    def test_failed_estimate_is_an_error(
        self, run: Callable[..., Result], service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "set.txt").write_text("a cat\n")
        monkeypatch.setattr(service.runner.context.pipelines, "load_encoders", lambda *_, **__: 1 / 0)
        done = run("statistics", "create", "tiny", str(tmp_path / "set.txt"), "--wait")
        assert str(done.exception).startswith("uploaded failed: ")

    def test_models_are_listed_and_shown(self, run: Callable[..., Result], service: Service) -> None:
        assert "tiny" in run("models", "list", scope="read").output
        (listed,) = as_json(run("models", "list", "--json"))
        assert as_json(run("models", "show", "tiny", "--json")) == listed
        assert listed["digest"] in run("models", "show", "tiny").output
        assert listed["statistics"]["id"] in run("statistics", "list", "tiny").output
        assert last_line(run("models", "watch", "tiny")) == ["tiny", "ready"]

    def test_batch_is_created_from_a_file(self, run: Callable[..., Result], service: Service, tmp_path: Path) -> None:
        (tmp_path / "edits.csv").write_text("source,destination\nfox,owl\noak,elm\n")
        made = as_json(run("edits", "batch", "tiny", str(tmp_path / "edits.csv"), "--json"))
        assert [edit["source"] for edit in made["edits"]] == ["fox", "oak"]
        (tmp_path / "edits.jsonl").write_text('{"source": "fox", "destination": {}}\n')
        rejected = run("edits", "batch", "tiny", str(tmp_path / "edits.jsonl"))
        assert code(rejected) == ExitCode.REJECTED
        assert "  edits.jsonl, line 1: destination: must be exactly one" in str(rejected.exception)
        (tmp_path / "edits.TSV").write_bytes("source\tdestination\nfox\towl\n\n\telm\n".encode("utf-16"))
        rejected = run("edits", "batch", "tiny", str(tmp_path / "edits.TSV"))
        assert "  edits.TSV, line 4: source: " in str(rejected.exception)
        (tmp_path / "edits.csv").write_bytes(b"source,destination\nfox,caf\xe9\n")
        rejected = run("edits", "batch", "tiny", str(tmp_path / "edits.csv"))
        assert "not UTF-8 at byte 26" in str(rejected.exception)
        assert code(run("edits", "batch", "tiny", __file__)) == ExitCode.USAGE

    def test_edits_are_cancelled_and_retried(self, run: Callable[..., Result], service: Service) -> None:
        ids = [
            last_line(run("edits", "create", "tiny", source, "--destination", "owl"))[0] for source in ("fox", "oak")
        ]
        listed = as_json(run("edits", "list", "--model", "tiny", "--state", "queued", "--json"))
        assert [edit["id"] for edit in listed] == ids[::-1]
        assert last_line(run("edits", "cancel", ids[0])) == [ids[0], "cancelled"]
        watched = run("edits", "watch", ids[0])
        assert code(watched) == ExitCode.FAILED and "fox cancelled" in str(watched.exception)
        assert code(run("edits", "retry", ids[1])) == ExitCode.CONFLICT
        assert last_line(run("edits", "retry", ids[0])) == [ids[0], "queued"]
        for text in ("fox", "owl", ids[0]):
            assert text in run("edits", "list").output and text in run("edits", "show", ids[0]).output
        assert code(run("edits", "value", ids[0], "unused")) == ExitCode.CONFLICT

    def test_value_is_saved_as_safetensors(self, run: Callable[..., Result], service: Service, tmp_path: Path) -> None:
        import safetensors

        done = run("edits", "value", str(service.edit("fox")), str(tmp_path / "value.safetensors"), "--json")
        with safetensors.safe_open(as_json(done)["file"], framework="np") as file:
            assert set(file.keys()) == {"text_encoder.delta", "text_encoder.hidden"}

    def test_unknown_names_suggest_existing_ones(self, run: Callable[..., Result], service: Service) -> None:
        unknown = run("checkpoints", "list", "tinny")
        assert code(unknown) == ExitCode.NOT_FOUND
        assert str(unknown.exception).splitlines()[1] == "Existing models: tiny. `emender models list` lists all."
        assert "The model has no checkpoints." in str(run("checkpoints", "show", "tiny", "production").exception)
        service.apply(edits=[str(service.edit("fox"))], alias="staging")
        assert "Existing aliases and versions: staging, v1." in str(run("checkpoints", "diff", "tiny", "v7").exception)


class TestVersions:
    @pytest.fixture
    def versions(self, service: Service) -> list[dict[str, Any]]:
        """v1 (fox) under `production`, v2 (fox and owl)."""
        ids = [str(service.edit(source)) for source in ("fox", "owl")]
        return [service.apply(edits=ids[:1], alias="production"), service.apply(edits=ids)]

    def test_checkpoints_are_shown_and_compared(
        self, run: Callable[..., Result], versions: list[dict[str, Any]]
    ) -> None:
        shown = run("checkpoints", "show", "tiny", "v1").output
        assert versions[0]["commit"] in shown and "fox" in shown and "text_encoder/model.safetensors" in shown
        assert as_json(run("checkpoints", "show", "tiny", "production", "--json"))["version"] == "v1"
        difference = run("checkpoints", "diff", "tiny", "v2", "v1").output
        assert "+ owl" in difference and "changed    text_encoder/model.safetensors" in difference
        assert as_json(run("checkpoints", "diff", "tiny", "v1", "--json"))["against"] == "base"
        assert last_line(run("checkpoints", "watch", "tiny", "v2"))[:2] == ["v2", "published"]

    def test_alias_is_moved_and_rolled_back(
        self, run: Callable[..., Result], versions: list[dict[str, Any]], service: Service
    ) -> None:
        assert last_line(run("aliases", "show", "tiny", "production")) == ["production", "v1"]
        late = run("aliases", "move", "tiny", "production", "v2", "--expected", "v3")
        assert code(late) == ExitCode.CONFLICT and "points at v1, not at v3" in str(late.exception)
        nowhere = run("aliases", "rollback", "tiny", "production")
        assert code(nowhere) == ExitCode.CONFLICT and "Give --to" in str(nowhere.exception)
        moved = run("aliases", "move", "tiny", "production", "v2", "--expected", "v1", "--reason", "better")
        assert moved.output.splitlines()[-1] == "production v1 -> v2"
        assert as_json(run("aliases", "rollback", "tiny", "production", "--json"))["version"] == "v1"
        assert last_line(run("aliases", "move", "tiny", "next", "v2", "--expected", "none")) == ["next", "v2"]
        assert {item["name"] for item in as_json(run("aliases", "list", "tiny", "--json"))} == {
            "next",
            "production",
        }
        history = as_json(run("aliases", "history", "tiny", "production", "--json"))
        assert [period["version"] for period in history] == ["v1", "v2", "v1"]
        events = service.client.get("/v1/audit?action=alias.move", headers=service.keys["admin"]).json()["items"]
        assert [event["reason"] for event in events[:3]] == [None, "rollback", "better"]

    def test_checkpoint_is_retracted_and_traced(
        self, run: Callable[..., Result], versions: list[dict[str, Any]]
    ) -> None:
        sha256 = next(file["sha256"] for file in versions[1]["files"] if file["path"].startswith("text_encoder/m"))
        traced = as_json(run("files", "trace", sha256, "--json"))
        assert [origin["version"] for origin in traced["origins"]] == ["v2"]
        assert code(run("files", "trace", "no-such-file")) == ExitCode.USAGE
        assert last_line(run("checkpoints", "retract", "tiny", "v2", "--reason", "wrong flag")) == ["v2", "retracted"]
        assert code(run("checkpoints", "diff", "tiny", "v2")) == ExitCode.NOT_FOUND

    def test_preview_is_drawn_and_downloaded(
        self, run: Callable[..., Result], versions: list[dict[str, Any]], tmp_path: Path
    ) -> None:
        quick = ["--prompt", "a photo of fox", "--seed", "3", "--num-inference-steps", "2"]
        folder = tmp_path / "a"
        made = as_json(run("previews", "create", "tiny", "v1", *quick, "--wait", "--folder", str(folder), "--json"))
        assert (made["state"], [path.name for path in folder.iterdir()]) == ("ready", ["before-after.png"])
        queued = as_json(run("previews", "create", "tiny", "v1", *quick, "--json"))["id"]
        assert last_line(run("evaluations", "cancel", "tiny", "v1", queued)) == [queued, "cancelled"]
        listed = as_json(run("evaluations", "list", "tiny", "v1", "--kind", "preview", "--json"))
        assert [item["id"] for item in listed] == [queued, made["id"]]
        assert "before-after.png" in run("evaluations", "show", "tiny", "v1", made["id"]).output
        assert code(run("evaluations", "watch", "tiny", "v1", queued)) == ExitCode.FAILED
        again = as_json(run("evaluations", "download", "tiny", "v1", made["id"], str(tmp_path / "b"), "--json"))
        assert again == {"files": [str(tmp_path / "b" / "before-after.png")]}
        without = run("evaluations", "create", "tiny", "v1", "--seed", "1")
        assert code(without) == ExitCode.CONFLICT and "classifier" in str(without.exception)

    def test_names_are_completed(self, run: Callable[..., Result], versions: list[dict[str, Any]]) -> None:
        def completed(*arguments: Any) -> Any:
            run("models", "list")  # so that commands know the service
            words = " ".join(["emender", *arguments])
            asked = {"_EMENDER_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
            return CliRunner().invoke(build_command(), [], env=asked, prog_name="emender").output

        assert "tiny" in completed("models", "show", "t")
        assert "production" in completed("checkpoints", "show", "tiny", "p")
        assert "v2" in completed("checkpoints", "diff", "tiny", "v")
        assert "fox, ready" in completed("edits", "show", "0")


def commands(group: Any = None, path: Any = ()) -> Iterator[Any]:
    """Iterate over (path, command) of all commands."""
    group = group or typer.main.get_command(build_command())
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


class TestReference:
    def test_every_command_has_json_output(self) -> None:
        lacking = [path for path, command in commands() if "--json" not in {o for p in command.params for o in p.opts}]
        assert lacking == []

    def test_every_command_and_option_has_help(self) -> None:
        for path, command in commands():
            assert command.help, path
            assert [param.name for param in command.params if not param.help] == [], path


EDIT = {
    "id": "00000000-0000-7000-8000-000000000000", "model": "emoji", "source": "dog", "destination": {"prompt": "cat"},
    "templates": ["{}"], "settings": {}, "reason": None, "labels": {}, "state": "queued", "progress": None,
    "attempt": 0, "problem": None, "value": None, "created_by": "test", "created_at": "2026-11-24T12:00:00Z",
    "updated_at": "2026-11-24T12:00:00Z",
}  # fmt: skip


class TestTerminals:
    """The command in a process, against a service whose work never ends."""

    @pytest.fixture
    def stub(self) -> Iterator[str]:
        ended = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(202, json.dumps(EDIT).encode(), "application/json")

            def do_GET(self) -> None:
                status: dict[str, Any] = {"id": EDIT["id"], "attempt": 1, "problem": None}
                status |= {"state": "optimizing", "progress": {"stage": "optimizing", "done": 1, "total": 4}}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(f"id: 1\ndata: {json.dumps(status)}\n\n".encode())
                self.wfile.flush()
                ended.wait(patience(60))

            def answer(self, status: Any, content: Any, kind: Any) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            ended.set()
            server.shutdown()
            thread.join()

    def interrupt(self, stub: Any, stderr: Any, awaited: Any, **environment: Any) -> Any:
        """Press Ctrl-C after the awaited output. Return the exit code, stdout and stderr."""
        here, there = stderr
        command = [
            sys.executable,
            "-m",
            "emender",
            "edits",
            "create",
            "emoji",
            "dog",
            "--destination",
            "cat",
            "--wait",
        ]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
        given = clean | {"EMENDER_URL": stub, "EMENDER_API_KEY": "em_a_b"} | environment
        listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # ignored in a background
        process = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=there, preexec_fn=listening)
        os.close(there)
        written = b""
        while awaited not in written:
            written += os.read(here, 4096)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=patience(60))
        with suppress(OSError):  # a terminal that was left
            while more := os.read(here, 4096):
                written += more
        os.close(here)
        return process.returncode, out.decode(), written.decode()

    def test_interrupted_wait_names_the_command_that_shows_the_work(self, stub: str) -> None:
        code, out, err = self.interrupt(stub, os.pipe(), b"optimizing")
        assert (code, out) == (ExitCode.INTERRUPTED, "")
        assert err == (
            "optimizing dog: optimizing\n"
            f"Interrupted: optimizing dog continues. `emender edits watch {EDIT['id']}` shows it.\n"
        )

    def test_wait_ends_after_the_timeout(self, stub: str) -> None:
        done = run_emender(
            "edits", "watch", str(EDIT["id"]), "--timeout", "1", EMENDER_URL=stub, EMENDER_API_KEY="em_a_b"
        )
        assert done.returncode == ExitCode.TIMED_OUT
        assert done.stderr.endswith("is still optimizing.\n")

    def test_terminal_without_color_gets_a_plain_bar(self, stub: str) -> None:
        plain = {"NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
        code, out, err = self.interrupt(stub, os.openpty(), b"25%", **plain)
        assert (code, out) == (ExitCode.INTERRUPTED, "")
        assert "optimizing dog (optimizing)" in err and "continues" in err
        assert not re.search(r"\x1b\[[0-9;]*(?<![0-9])(3[0-8]|4[0-8]|9[0-7])[;m]", err)
