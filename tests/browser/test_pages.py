"""The pages in a real Chromium: a story from an edit to its end, at 1100 and at 360 pixels, in light and in dark.

Screenshots of all go to `out/browser/`.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.browser.conftest import Site

pytest.importorskip("playwright", reason="`make browser` installs it")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Response

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

SCREENSHOTS = Path("out/browser")
SCHEMES, WIDTHS = ("light", "dark"), (1100, 360)
JUDGED = (("light", 1100), ("dark", 360))
"""Where axe looks: at both schemes and both widths."""
PATIENCE = 120_000  # milliseconds for what a worker does


class Reader:
    """A browser tab that collects the errors of its pages."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: self._complain(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("response", self._loaded)

    def _complain(self, text: str) -> None:
        if "the server responded with a status of" not in text:  # of pages it is meant, the rest is below
            self.complaints.append(f"{self.page.url}: {text}")

    def _loaded(self, response: Response) -> None:
        if response.status >= 400 and not response.request.is_navigation_request():
            self.complaints.append(f"{response.url}: {response.status}")

    def look(self, name: str) -> None:
        """Screenshots of the page as it is, at both widths and in both schemes, and what axe says of it."""
        page = self.page
        page.wait_for_load_state("load")
        for scheme, width in itertools.product(SCHEMES, WIDTHS):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 800})
            if page.evaluate("document.documentElement.scrollWidth") > width:
                self.complaints.append(f"{name}: wider than {width} pixels")
            page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}-{width}.png", full_page=True)
            if (scheme, width) in JUDGED:
                self.complaints += [f"{name}, {scheme}, {width}: {found}" for found in serious(page)]
        page.set_viewport_size({"width": 1100, "height": 800})
        broken = "[...document.images].filter(image => image.complete && !image.naturalWidth).length"
        assert page.evaluate(broken) == 0, name
        assert page.title() != "run"


def serious(page: Page) -> list[str]:
    """What axe finds that keeps people out."""
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {violation['nodes'][0]['html']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def sign_in(page: Page, site: Site, *, to: str = "") -> None:
    """By keyboard alone, on the page that is led to."""
    page.goto(f"{site.url}/{to}")
    assert page.url.startswith(f"{site.url}/sign-in")
    page.get_by_label("API key").focus()
    page.keyboard.type(site.key)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{site.url}/{to}")


def moved(page: Page) -> None:
    """Wait until the page's bar has moved, without loading the page again."""
    first = page.locator("#live progress").get_attribute("value", timeout=PATIENCE)
    page.locator(f'#live progress:not([value="{first}"])').wait_for(timeout=PATIENCE)


@pytest.fixture
def reader(chromium: Browser) -> Iterator[Reader]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    context = chromium.new_context(viewport={"width": 1100, "height": 800})
    yield Reader(context.new_page())
    context.close()


def test_the_story(site: Site, reader: Reader, tmp_path: Path) -> None:
    page, look = reader.page, reader.look
    page.goto(f"{site.url}/sign-in")
    look("sign-in")
    sign_in(page, site)

    # An edit by reference images: refused once, then followed until it is ready, on a page that is loaded once.
    page.goto(f"{site.url}/models/tiny/edits/new")
    look("edit-form")
    pictures = [tmp_path / f"{colour}.png" for colour in ("red", "orange")]
    for picture in pictures:
        Image.new("RGB", (64, 64), picture.stem).save(picture)
    page.get_by_label("Source").fill("cat")
    page.get_by_label("Reference images").check()
    assert not page.get_by_label("Prompt", exact=True).is_visible()
    page.get_by_label("Images", exact=True).set_input_files(pictures)
    page.get_by_label("Reason").fill("LEGAL-42: the wrong cat")
    page.get_by_text("Settings").click()
    page.get_by_label("Steps").fill("many")
    page.get_by_role("button", name="Create edit").click()
    page.get_by_role("alert").wait_for()
    assert page.get_by_label("Source").input_value() == "cat"
    assert page.get_by_label("Use image 2").is_checked()
    look("edit-form-refused")
    page.get_by_role("link", name="/settings/optimization_steps").press("Enter")
    page.get_by_label("Steps").fill("700")
    page.get_by_role("button", name="Create edit").click()
    page.wait_for_url("**/edits/*-*")
    edit = page.url
    page.evaluate("window.loadedOnce = true")
    moved(page)
    overview = Reader(page.context.new_page())
    overview.page.goto(f"{site.url}/")
    moved(overview.page)
    overview.look("overview")
    overview.page.close()
    look("edit-under-way")
    page.locator("#live .state.ready").wait_for()
    assert page.evaluate("window.loadedOnce")
    assert page.locator("#announced").text_content() == "Now ready."
    assert page.locator("polyline.curve").count() == 1 and page.locator("[hx-get]").count() == 0
    look("edit")

    # Another one, and a version of each: chosen by boxes, then from the version before.
    page.goto(f"{site.url}/models/tiny/apply")
    page.get_by_label("cat").check()
    page.get_by_label("Alias to move").fill("production")
    page.get_by_label("Reason").fill("LEGAL-42")
    look("apply-form")
    page.get_by_role("button", name="Dry run").click()
    page.get_by_text("Nothing was changed.").wait_for()
    look("apply-plan")
    page.get_by_role("button", name="Apply", exact=True).click()
    page.wait_for_url("**/checkpoints/v1")
    page.locator("#live .state.published").wait_for()
    page.goto(f"{site.url}/models/tiny/edits/new")
    page.get_by_label("Source").fill("dog")
    page.get_by_label("Prompt", exact=True).fill("fox")
    page.get_by_text("Settings").click()
    page.get_by_label("Objective").select_option("text")
    page.get_by_label("Steps").fill("5")
    page.get_by_role("button", name="Create edit").click()
    page.locator("#live .state.ready").wait_for()
    page.goto(f"{site.url}/models/tiny/apply?from=v1")
    page.get_by_role("group", name="Add").get_by_label("dog").check()
    page.get_by_label("Source contains").fill("nothing like it")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 chosen edit is hidden by the filter.").wait_for()
    page.get_by_label("Alias to move").fill("production")
    page.get_by_role("button", name="Dry run").click()
    page.get_by_text("production moves from v1 to the new checkpoint").wait_for()
    page.get_by_role("button", name="Apply", exact=True).click()
    page.wait_for_url("**/checkpoints/v2")
    page.locator("#live .state.published").wait_for()

    # Compared in words, in weights and in pictures.
    page.get_by_label("Compare with").fill("v1")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("table", name="Added").get_by_role("link", name="dog").wait_for()
    look("difference")
    page.goto(f"{site.url}/models/tiny/checkpoints/v2")
    page.get_by_role("link", name="Draw pictures").click()
    page.get_by_label("Prompts").fill("a photo of a dog")
    page.get_by_label("Seeds").fill("0")
    page.get_by_label("Inference steps").fill("2")
    look("evaluation-form")
    page.get_by_role("button", name="Draw").click()
    page.locator("#live img").wait_for()
    look("evaluation")
    page.goto(f"{site.url}/models/tiny/checkpoints/v2")
    page.get_by_alt_text("Pictures before and after").wait_for()
    look("version")

    # Rolled back, found in the audit log and taken away from there.
    page.get_by_role("link", name="production").click()
    page.get_by_role("link", name="Roll back to v1").click()
    page.get_by_label("Reason").fill("LEGAL-43: the fox is wrong")
    look("move-alias")
    page.get_by_role("button", name="Move production from v2 to v1").click()
    page.wait_for_url("**/aliases/production")
    assert "Points at v1" in (page.locator("main").text_content() or "")
    look("alias")
    page.goto(f"{site.url}/audit")
    page.get_by_label("Action").fill("alias.move")
    page.get_by_label("Target").fill("alias:tiny/production")
    page.get_by_role("button", name="Filter").click()
    page.get_by_text("LEGAL-43: the fox is wrong", exact=True).wait_for()
    assert page.locator("tbody tr").count() == 3
    look("audit")
    with page.expect_download() as download:
        page.get_by_role("link", name="NDJSON").click()
    events = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [event["reason"] for event in events] == ["LEGAL-42", None, "LEGAL-43: the fox is wrong"]

    # Retracted.
    page.goto(f"{site.url}/models/tiny/checkpoints/v2")
    page.get_by_role("link", name="Retract").click()
    page.get_by_label("Reason").fill("LEGAL-43")
    look("retract")
    page.get_by_role("button", name="Retract v2").click()
    page.locator("#live .state.retracted").wait_for()
    page.goto(f"{site.url}/models/tiny/checkpoints")
    look("versions")

    # A key, from its making to its end.
    page.goto(f"{site.url}/keys")
    page.get_by_text("Create a key").click()
    page.get_by_label("Name").fill("release pipeline")
    page.get_by_label("apply", exact=True).check()
    look("keys")
    page.get_by_role("button", name="Create").click()
    assert page.get_by_label("API key").input_value().startswith("em_")
    look("key-created")
    page.get_by_role("link", name="Done").click()
    page.get_by_role("link", name="Revoke release pipeline").click()
    look("revoke")
    page.get_by_role("button", name="Revoke release pipeline").click()
    page.get_by_role("row", name="release pipeline").get_by_text("revoked").wait_for()

    for name, path in {"model": "models/tiny", "edits": "models/tiny/edits", **site.pages}.items():
        page.goto(f"{site.url}/{path}")
        look(name)
    assert reader.complaints + overview.complaints == []

    without = page.context.browser.new_context(java_script_enabled=False)
    sign_in(plain := without.new_page(), site)
    plain.goto(edit)
    assert plain.locator("#live .state.ready").count() == 1
    without.close()


def test_by_keyboard(site: Site, reader: Reader) -> None:
    page = reader.page
    sign_in(page, site, to="models/emoji/edits")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.get_by_label("Source contains").focus()
    page.keyboard.type("queued")
    page.keyboard.press("Enter")
    page.wait_for_url("**/edits?text=queued*")
    assert page.locator("tbody tr").count() == 1
    page.get_by_role("link", name="queued fox").press("Enter")
    page.wait_for_url("**/edits/*")
    cancel = page.get_by_role("button", name="Cancel")
    cancel.focus()
    with page.expect_response("**/edits/*?seen=queued"):
        pass
    page.wait_for_timeout(200)
    assert page.evaluate("document.activeElement.textContent") == "Cancel"  # also in what was loaded since
    page.goto(f"{site.url}/models/emoji/edits/new")
    page.get_by_label("A prompt").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "/destination/neutral"
    page.get_by_role("button", name="Sign out").press("Enter")
    page.wait_for_url(f"{site.url}/sign-in")
    page.goto(f"{site.url}/audit")
    assert page.url.startswith(f"{site.url}/sign-in")
