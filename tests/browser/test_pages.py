"""The pages in a real Chromium: signed in to, read at 1100 and at 360 pixels, in light and in dark, and by keyboard.

Screenshots of all go to `out/browser/`.
"""

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from app.checkpoints.publish import store_content
from app.db.models import EditValue, Evaluation
from app.main import create_app
from app.settings import Settings
from app.storage.local import LocalStore
from tests.app.conftest import Headers
from tests.security.servers import start_api
from tests.seeded import seed

pytest.importorskip("playwright", reason="`make browser` installs it")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

pytestmark = pytest.mark.browser

SCREENSHOTS = Path("out/browser")
HOSTILE = "<script>document.title = 'run'</script>" + "unbroken" * 20


@dataclass(frozen=True)
class Site:
    url: str
    key: str
    pages: Mapping[str, str]


@pytest.fixture
def site(
    settings: Settings, store: LocalStore, clean_database: Engine, live_keys: Mapping[str, Headers], tmp_path: Path
) -> Iterator[Site]:
    """A served service with one of everything."""
    settings = settings.model_copy(update={"webhook_key": SecretStr("k" * 40)})
    with (
        TestClient(create_app(settings)) as client,
        Session(clean_database, expire_on_commit=False) as session,
    ):
        seeded = seed(session, client, live_keys, store=store, folder=tmp_path / "tokenizer")
        Image.linear_gradient("L").save(tmp_path / "grid.png")
        file = store_content(store, "before-after.png", (tmp_path / "grid.png").read_bytes())
        files = [{"name": file.path, "sha256": file.sha256, "size": file.size}]
        session.execute(update(Evaluation).values(state="ready", files=files, report={"prompts": [HOSTILE]}))
        losses = {"text": [1.5, 0.2, 0.0007], "noise": [0.3, 0.2, 0.1], "delta_norm": 3.0, "hidden_norm": 27.0}
        session.execute(update(EditValue).values(losses=losses))
        edit = seeded.edits["ready"]
        edit.source, edit.reason = HOSTILE, HOSTILE
        session.commit()
        number = seeded.parameters["evaluation_id"]
    versions = "models/emoji/checkpoints"
    pages = {
        "overview": "",
        "edits": "models/emoji/edits",
        "edit": f"edits/{edit.id}",
        "versions": versions,
        "version": f"{versions}/v1",
        "difference": f"{versions}/v2/difference?against=v1",
        "evaluation": f"{versions}/v1/evaluations/{number}",
        "audit": "audit",
        "nothing": "nothing",
    }
    with start_api(settings, live_keys, log=tmp_path / "log") as server:
        key = live_keys["admin"]["Authorization"].removeprefix("Bearer ")
        host, port = server.address
        yield Site(f"http://{host}:{port}/admin", key, pages)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    executable = os.environ.get("EMENDER_TEST_CHROMIUM") or shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no chromium on the PATH; EMENDER_TEST_CHROMIUM names one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def sign_in(page: Page, site: Site, *, to: str = "") -> None:
    """By keyboard alone, on the page that is led to."""
    page.goto(f"{site.url}/{to}")
    assert page.url.startswith(f"{site.url}/sign-in")
    page.get_by_label("API key").focus()
    page.keyboard.type(site.key)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{site.url}/{to}")


def serious(page: Page) -> list[str]:
    """What axe finds that keeps people out."""
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {violation['nodes'][0]['html']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def test_every_page(site: Site, chromium: Browser) -> None:
    for scheme, width in itertools.product(("light", "dark"), (1100, 360)):
        read_all(site, chromium, scheme, width)


def read_all(site: Site, chromium: Browser, scheme: str, width: int) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{site.url}/sign-in")
    problems = {"sign-in": serious(page)}
    page.screenshot(path=SCREENSHOTS / f"sign-in-{scheme}-{width}.png", full_page=True)
    sign_in(page, site)
    for name, path in site.pages.items():
        complaints.clear()
        page.goto(f"{site.url}/{path}")
        assert page.title() != "run"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
        page.wait_for_load_state("networkidle")
        assert page.evaluate(broken) == 0, name
        page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}-{width}.png", full_page=True)
        assert complaints == [] or name == "nothing", name
        problems[name] = serious(page)
    assert {name: found for name, found in problems.items() if found} == {}
    context.close()


def test_by_keyboard(site: Site, chromium: Browser) -> None:
    page = chromium.new_page()
    sign_in(page, site, to="models/emoji/edits")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.get_by_label("Source contains").focus()
    page.keyboard.type("queued")
    page.keyboard.press("Enter")
    page.wait_for_url("**/edits?text=queued*")
    assert page.locator("tbody tr").count() == 1
    page.get_by_role("link", name="queued fox").press("Enter")
    page.wait_for_url("**/edits/*")
    assert page.evaluate("getComputedStyle(document.body).fontFamily").startswith("system-ui")
    page.get_by_role("button", name="Sign out").press("Enter")
    page.wait_for_url(f"{site.url}/sign-in")
    page.goto(f"{site.url}/audit")
    assert page.url.startswith(f"{site.url}/sign-in")
    page.context.close()
