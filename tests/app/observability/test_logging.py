import json
import logging
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

PROBE = """
import logging, structlog
from app.observability.logging import configure
configure()
log = structlog.get_logger()
log.info("edit ready", edit="1")
logging.getLogger("uvicorn.error").warning("started %s", "here")
logging.getLogger("uvicorn.access").info("GET /?token=secret")
def fail():
    secret = "em_prefix_s3cret"
    raise ValueError("broken")
try:
    fail()
except ValueError:
    log.exception("failed")
"""


def test_logs_are_json_lines_without_secrets() -> None:
    ran = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["edit ready", "started here", "failed"]
    assert lines[0]["edit"] == "1"
    assert {line["level"] for line in lines} == {"info", "warning", "error"}
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert "ValueError: broken" in lines[2]["exception"]
    assert "s3cret" not in ran.stderr.replace('secret = "em_prefix_s3cret"', "")
    assert ran.stdout == ""


def test_import_configures_no_logger() -> None:
    probe = "import logging, app.observability.logging, app.main; assert not logging.getLogger().handlers"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True)
    assert logging.getLogger("uvicorn.error").level == logging.NOTSET
