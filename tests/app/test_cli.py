"""The command `emender`: in a process of its own where that matters, else through the test's application."""

import json
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

import editing
from app import cli
from app.client import Client
from app.webhooks.sender import Sender
from app.webhooks.signing import WebhookKey
from tests.app.checkpoints.conftest import Service, base_folder, service

__all__ = ["base_folder", "service"]


def emender(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command, with no setting but those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120, check=False)


def last_line(done) -> list[str]:
    """The words of what the command printed; the worker's log lines come before it."""
    return done.output.splitlines()[-1].split()


def as_json(done) -> Any:
    return json.loads(done.output.splitlines()[-1])


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch):
    """Run a command against the service, as a key with these scopes."""

    def invoke(*arguments: str, scope: str = "admin"):
        token = service.keys[scope]["Authorization"].removeprefix("Bearer ")

        def client(_: object) -> Client:
            made = Client("http://testserver", api_key=token)
            made._http = service.client
            made._http.headers["Authorization"] = f"Bearer {token}"
            return made

        monkeypatch.setattr(Client, "from_settings", client)
        monkeypatch.setattr(Client, "__exit__", lambda *_: None)  # the test's client serves the next command too
        monkeypatch.setattr("app.client.time.sleep", lambda _: service.runner.work())
        return CliRunner().invoke(cli.app, arguments, catch_exceptions=True)

    return invoke


class TestProcess:
    def test_help_without_torch(self):
        heavy = ("torch", "transformers", "diffusers", "fastapi", "pyarrow")
        code = f"import sys, app.cli; sys.exit(sum(name in sys.modules for name in {heavy}))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_no_key(self, tmp_path):
        done = emender("checkpoints", "list", "tiny", EMENDER_FOLDER=str(tmp_path))
        assert (done.returncode, done.stdout) == (1, "")
        assert "EMENDER_API_KEY" in done.stderr
        assert "Traceback" not in done.stderr

    def test_nobody_answers(self):
        done = emender("checkpoints", "list", "tiny", EMENDER_URL="http://127.0.0.1:9", EMENDER_API_KEY="em_a_b")
        assert done.returncode == 1
        assert "No Emender answers at http://127.0.0.1:9" in done.stderr

    def test_bad_setting(self):
        done = emender("migrate", EMENDER_PORT="many")
        assert done.returncode == 1
        assert done.stderr.startswith("EMENDER_PORT: ")

    def test_no_database(self):
        for command in (["migrate"], ["worker"], ["keys", "create", "ci", "--scope", "read"]):
            done = emender(*command)
            assert done.returncode == 1
            assert "EMENDER_DATABASE_URL is not set" in done.stderr

    def test_migrate_and_first_key(self, clean_database, database_url, settings):
        """A key made on the command line opens the API, with its scopes only."""
        assert emender("migrate", EMENDER_DATABASE_URL=database_url).returncode == 0
        made = emender("keys", "create", "deploy", "--scope", "read", EMENDER_DATABASE_URL=database_url)
        assert made.returncode == 0, made.stderr
        from fastapi.testclient import TestClient

        from app.main import create_app

        with TestClient(create_app(settings)) as client:
            headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert client.get("/v1/keys", headers=headers).status_code == 403
        refused = emender("keys", "create", "deploy", "--scope", "root", EMENDER_DATABASE_URL=database_url)
        assert refused.returncode == 1
        assert "'root'" in refused.stderr


class TestCommands:
    def test_apply_waits_and_lists(self, run, service):
        edit = service.edit("fox")
        done = run("apply", "tiny", "--edit", str(edit), "--alpha", "0.6", "--alias", "staging", "--wait")
        assert done.exit_code == 0, done.output
        checkpoint = service.get("/v1/models/tiny/checkpoints/v1")
        assert f"v1 published {checkpoint['commit']}" in done.output
        assert (checkpoint["alpha"], checkpoint["aliases"]) == (0.6, ["staging"])
        listed = run("checkpoints", "list", "tiny")
        assert "v1" in listed.output and "staging" in listed.output

    def test_dry_run(self, run, service):
        old, new = service.edit("fox"), service.edit("fox")
        done = run("apply", "tiny", "--dry-run")
        assert done.exit_code == 0
        assert f"{new}  fox" in done.output
        assert f"{old}  left out" in done.output
        assert service.get("/v1/models/tiny/checkpoints")["items"] == []

    def test_problem_is_readable(self, run, service):
        service.edit("fox")
        done = run("apply", "tiny", "--alpha", "1")
        assert str(done.exception).splitlines()[0].startswith("Invalid request (422): ")
        assert "  /alpha: " in str(done.exception)

    def test_failed_checkpoint(self, run, service, monkeypatch):
        service.edit("fox")
        monkeypatch.setattr("app.worker.build_checkpoint.card", lambda *_, **__: 1 / 0)
        done = run("apply", "tiny", "--wait")
        assert str(done.exception).startswith("v1 is failed: ")

    def test_edit_by_text(self, run, service):
        done = run(
            "edits", "create", "tiny", "fox", "--destination", "owl", "--objective", "text", "--steps", "3", "--wait"
        )
        assert done.exit_code == 0, done.output
        edit_id, state = last_line(done)
        assert state == "ready"
        edit = service.get(f"/v1/edits/{edit_id}")
        assert (edit["source"], edit["destination"], edit["settings"]["steps"]) == ("fox", {"prompt": "owl"}, 3)

    def test_edit_by_images_and_erasure(self, run, service, tmp_path):
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
    def test_edit_with_no_or_two_destinations(self, run, destination):
        done = run("edits", "create", "tiny", "fox", *destination)
        assert isinstance(done.exception, cli.CommandError)

    def test_model_add(self, run):
        done = run("models", "add", "other", "nowhere", "--wait")
        assert str(done.exception).startswith("other is failed: ")
        assert "nowhere" in str(done.exception)
        done = run("models", "add", "third", "../etc")
        assert "  /source: " in str(done.exception)

    def test_webhooks(self, run, service):
        service.settings.webhook_key = SecretStr("k" * 40)
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
        assert "disabled" in run("webhooks", "test", made["id"]).exception.document["title"]
        assert run("webhooks", "update", made["id"], "--enable").output.endswith("enabled\n")
        assert run("webhooks", "delete", second["id"]).exit_code == 0
        assert [item["id"] for item in as_json(run("webhooks", "list", "--json"))] == [made["id"]]
        assert isinstance(run("webhooks", "create", url).exception, cli.CommandError)
        assert made["id"] in run("webhooks", "list").output
        assert run("webhooks", "list", scope="read").exception.status == 403

    def test_webhook_deliveries(self, run, service, monkeypatch):
        """A ping is tried, as by a worker, at a name that has no address; another waits in vain."""
        service.settings.webhook_key = SecretStr("k" * 40)
        made = as_json(run("webhooks", "create", "https://a.invalid/", "--event", "alias.moved", "--json"))

        def nowhere(host: str, port: int) -> list[str]:
            raise OSError("no such name")

        sender = Sender(service.sessions, key=WebhookKey(b"k" * 40), resolve=nowhere)
        monkeypatch.setattr(service.runner, "work", lambda: sender.round(threading.Event()))  # while the command sleeps
        tried = run("webhooks", "test", made["id"], "--wait")
        assert tried.exit_code == 1 and "a.invalid cannot be resolved" in tried.output
        (sent,) = as_json(run("webhooks", "deliveries", made["id"], "--json"))
        assert (sent["event"], sent["tries"]) == ("webhook.ping", 1)
        again = as_json(run("webhooks", "redeliver", made["id"], sent["id"], "--json"))
        assert again["message_id"] == sent["message_id"] and again["id"] != sent["id"]
        assert sent["id"] in run("webhooks", "deliveries", made["id"]).output
        monkeypatch.setattr("app.webhook_commands.TRY_SECONDS", 0.0)
        unsent = run("webhooks", "test", made["id"], "--wait")
        assert "EMENDER_WEBHOOK_KEY" in str(unsent.exception)

    def test_a_license_for_the_model_cards(self, run, service):
        given = ["--license", "other", "--license-name", "own", "--license-link", "https://a.example"]
        run("models", "add", "licensed", "nowhere", *given)
        license = {"id": "other", "name": "own", "link": "https://a.example"}
        assert service.get("/v1/models/licensed")["license"] == license
        assert "--license" in str(run("models", "add", "fourth", "nowhere", "--license-name", "own").exception)

    def test_statistics_of_a_file(self, run, service, tmp_path):
        """The captions sent are those of the file, from the column named, as many as asked for."""
        captions = [f"a picture of thing {n}" for n in range(80)]
        (tmp_path / "set.csv").write_text("id,alt\n" + "".join(f"{n},{line}\n" for n, line in enumerate(captions)))
        done = run(
            "statistics", "add", "tiny", str(tmp_path / "set.csv"), "--column", "alt", "--samples", "70", "--wait"
        )
        assert done.exit_code == 0, done.output
        statistics_id, state, digest = last_line(done)
        made = service.get(f"/v1/models/tiny/statistics/{statistics_id}")
        assert (made["state"], made["captions"], made["digest"], state) == ("ready", 70, digest, "ready")
        encoder = service.runner.context.pipeline(service.model.id).encoder
        assert digest == editing.estimate_second_moments(encoder, captions[:70]).digest

    def test_statistics_of_no_file(self, run, tmp_path):
        (tmp_path / "set.csv").write_text("id,title\n1,a cat\n")
        done = run("statistics", "add", "tiny", str(tmp_path / "set.csv"))
        assert "set.csv: there is no column 'caption' or 'text'" in str(done.exception)
        (tmp_path / "set.txt").write_text("\n")
        done = run("statistics", "add", "tiny", str(tmp_path / "set.txt"))
        assert str(done.exception) == "set.txt holds no captions."

    def test_statistics_that_failed(self, run, service, tmp_path, monkeypatch):
        (tmp_path / "set.txt").write_text("a cat\n")
        monkeypatch.setattr(service.runner.context.pipelines, "get", lambda *_, **__: 1 / 0)
        done = run("statistics", "add", "tiny", str(tmp_path / "set.txt"), "--wait")
        assert str(done.exception).startswith("uploaded is failed: ")
