import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parents[2]
PROBE = """
import json, sys
from pydantic import SecretStr
from app.main import create_app
from app.settings import Settings
app = create_app(Settings(database_url=SecretStr("postgresql://nowhere/emender")))
app.openapi()
print(json.dumps({"modules": sorted(sys.modules), "paths": sorted(app.openapi()["paths"])}))
"""


class TestImports:
    def test_no_torch(self) -> None:
        """A process with every router in place has loaded neither torch nor what would load it."""
        ran = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
        seen = json.loads(ran.stdout)
        for prefix in ("/v1/keys", "/v1/models", "/v1/edits", "/v1/images", "/v1/audit"):
            assert any(path.startswith(prefix) for path in seen["paths"]), prefix
        loaded = {name.partition(".")[0] for name in seen["modules"]}
        assert loaded & {"torch", "transformers", "diffusers", "rq"} == set()
        assert "editing" in loaded


class TestRequestId:
    def test_given_one_comes_back(self, client: TestClient) -> None:
        assert client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"

    @pytest.mark.parametrize("given", ["", "a b", "x" * 65, '"}{'])
    def test_odd_one_is_replaced(self, client: TestClient, given: str) -> None:
        answered = client.get("/healthz", headers={"X-Request-ID": given}).headers["X-Request-ID"]
        assert len(answered) == 36
        assert answered != given


def test_needs_a_database() -> None:
    with pytest.raises(ValueError, match="EMENDER_DATABASE_URL"):
        create_app(Settings(database_url=None))


class TestDocumentation:
    @pytest.mark.parametrize("page", ["/docs", "/redoc"])
    def test_nothing_on_the_page_comes_from_another_host(self, page: str) -> None:
        nowhere = Settings(database_url=SecretStr("postgresql://127.0.0.1:1/nowhere"))
        with TestClient(create_app(nowhere)) as client:
            sources = re.findall(r'(?:src|href)="([^"]+)"', client.get(page).text)
            assert any(source.endswith(".js") for source in sources)
            for source in sources:
                assert source.startswith("/") and not source.startswith("//")
                assert client.get(source).status_code == 200
