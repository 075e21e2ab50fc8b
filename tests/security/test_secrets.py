"""No secret in a log, a traceback, a command line or the database: real processes, provoked, and everything read."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from app.local.child_process import die_with_parent
from app.local.supervisor import to_environment
from app.settings import Settings
from tests.app.conftest import issue_keys
from tests.patience import patience
from tests.security.servers import Server, start_api
from tests.servers import RedisServer, require_redis

pytestmark = pytest.mark.slow

PASSWORD = "database-password-7f3a"
SECRETS = {
    "redis_password": "redis-password-91bc",
    "webhook_secret_key": "webhook-key-" + "5d" * 20,
    "s3_secret_access_key": "s3-secret-e2d4c6",
}


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    with server.client() as client:
        client.config_set("requirepass", SECRETS["redis_password"])
    yield server
    server.kill()


@pytest.fixture
def secretive(
    settings: Settings, clean_database: Engine, database_url: str, redis_server: RedisServer, tmp_path: Path
) -> Settings:
    """Every secret that the settings know is given."""
    url = make_url(database_url).set(password=PASSWORD).render_as_string(hide_password=False)
    (tmp_path / "roots" / "broken").mkdir(parents=True)
    (tmp_path / "roots" / "broken" / "model_index.json").write_text("{")
    given = {
        "database_url": SecretStr(url),
        "redis_url": SecretStr(redis_server.url.replace("//", f"//:{SECRETS['redis_password']}@")),
        "signing_key_file": "none",
    }
    secrets = {name: SecretStr(value) for name, value in SECRETS.items() if name != "redis_password"}
    found = settings.model_copy(update=given | secrets)
    kinds = {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert kinds == {"database_url", "redis_url", *secrets, "s3_access_key_id"}, "give the new secret here too"
    return found


def provoke(api: Server, redis_server: RedisServer, database: Engine) -> list[str]:
    """Errors of every kind; returns the secrets that came into the world meanwhile."""
    admin, guess = api.keys["admin"], "em_0123456789ab_" + "guessed-secret" * 3
    made = api.client.post("/v1/keys", headers=admin, json={"name": "a", "scopes": ["read"]}).json()
    hook = {"url": "https://deploy.example/hook-path-secret?token=hook-query-secret", "events": ["alias.moved"]}
    webhook = api.client.post("/v1/webhooks", headers=admin, json=hook)
    assert webhook.status_code == 201, webhook.text
    born = [made["token"], webhook.json()["secret"], guess]
    for path in ("/v1/models", f"/v1/models?token={guess}", "/api/whoami-v2"):
        assert api.client.get(path, headers={"Authorization": f"Bearer {guess}"}).status_code == 401
    as_json = admin | {"Content-Type": "application/json"}
    assert api.client.post("/v1/keys", headers=as_json, content=f'{{"name": "{guess}').status_code == 400
    wrong = {"name": guess, "scopes": ["root"]}
    assert api.client.post("/v1/keys", headers=admin, json=wrong).status_code == 422
    redis_server.kill()
    assert api.client.get("/v1/models", headers=admin).status_code == 200
    with database.begin() as connection:  # an unexpected error: a traceback in the log
        connection.execute(text("ALTER TABLE base_models RENAME TO hidden"))
    try:
        assert api.client.get("/v1/models", headers=admin).status_code == 500
        body = {"name": "m", "source": "a/b"}
        assert api.client.post("/v1/models", headers=admin, json=body).status_code == 500
    finally:
        with database.begin() as connection:
            connection.execute(text("ALTER TABLE hidden RENAME TO base_models"))
    return born


def dump(engine: Engine) -> str:
    """Every row of every table, as text."""
    rows = []
    with engine.connect() as connection:
        names = connection.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars().all()
        for name in names:
            rows += [str(row) for row in connection.execute(text(f'SELECT t::text FROM "{name}" t')).scalars()]
    return "\n".join(rows)


def command_lines(*parents: int) -> str:
    processes = [psutil.Process(pid) for pid in parents]
    family = [child for process in processes for child in (process, *process.children(recursive=True))]
    return "\n".join(" ".join(process.cmdline()) for process in family)


def test_no_secret_is_in_logs_responses_or_the_database(
    secretive: Settings, redis_server: RedisServer, clean_database: Engine, tmp_path: Path
) -> None:
    with Session(clean_database) as session:
        keys = issue_keys(session)
    log = tmp_path / "worker.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMENDER_")}
    with start_api(secretive, keys, log=tmp_path / "api.log") as api, log.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "app.worker.main"],
            env=environment | to_environment(secretive),
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent(),
        )
        try:
            model = {"name": "broken", "source": "broken"}
            assert api.client.post("/v1/models", headers=keys["admin"], json=model).status_code == 202
            deadline = time.monotonic() + patience(200)
            while api.client.get("/v1/models/broken", headers=keys["admin"]).json()["state"] == "registering":
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            born = provoke(api, redis_server, clean_database)
            lines = command_lines(api.process.pid, worker.pid)
        finally:
            worker.terminate()
            worker.wait(patience(60))
    told = {
        "the API's log": api.log.read_text(),
        "the worker's log": log.read_text(),
        "command lines": lines,
        "the database": dump(clean_database),
    }
    assert "Traceback" in told["the API's log"], "nothing was provoked"
    assert "Redis is unavailable" in told["the API's log"]
    tokens = [headers["Authorization"].removeprefix("Bearer ") for headers in keys.values()]
    secrets = [PASSWORD, *SECRETS.values(), *tokens, *born]
    for where, content in told.items():
        assert content, where
        for secret in secrets:
            for part in (secret, secret.rpartition("_")[2]):  # of a token, the secret half
                assert part not in content or len(part) < 12, f"{where} tells {secret}"
        if where != "the database":  # which keeps receivers' URLs whole, since it calls them
            assert "hook-path-secret" not in content and "hook-query-secret" not in content
