"""What the pages say is so: their commands run, and print what is shown."""

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.conftest import Reader
from tests.docs.pages import DOCS, NOT_RUN, OUTPUT, PAGES, ROOT, Block, blocks, count, difference, parse, recorded

PREPARED = DOCS / "how-to" / "index.md"  # what its reader did before any other page of the folder
RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_commands_run_and_print_what_is_shown(page: Path, reader: Reader) -> None:
    before = blocks(PREPARED) if page.parent == PREPARED.parent and page != PREPARED else []
    own = blocks(page)
    printed = reader.read([block for block in before + own if block.runs or block.file])
    last: Block | None = None
    for block in own:
        if block.title.startswith(OUTPUT):
            assert last is not None, f"{block}: the output of what?"
            assert difference(block, printed[last]) is None, f"{block}\n{difference(block, printed[last])}"
        last = block if block.runs else last


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_can_be_read(page: Path) -> None:
    for block in blocks(page):
        known = not block.title or block.title.startswith((OUTPUT, NOT_RUN)) or block.file
        assert known, f"{block}: {block.title!r} says neither an output, nor a file, nor why it is not run"
        assert parse(block) is None, f"{block}: {parse(block)}"


def test_make_knows_what_is_made() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    targets = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", text, re.MULTILINE))
    for target in sorted({first or second for first, second in targets}):
        known = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert "No rule to make target" not in known.stderr, target


@pytest.mark.parametrize("page", [page for page in PAGES if any(recorded(page))], ids=name)
def test_commands_of_measurements_are_those_that_there_are(page: Path) -> None:
    for command in recorded(page):
        words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
        if words[0] == "make":
            continue
        module = words[words.index("-m") + 1]
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, command
        code = "".join(file.read_text() for file in Path(spec.origin).parent.glob("*.py"))
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in code, f"{command}: {option}"


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of docs/ are held by its builder."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (ROOT / link).exists()] == []


def test_pictures_are_there_and_small() -> None:
    """The builder does not look for them."""
    for page in PAGES:
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / picture).stat().st_size < 400_000, f"{name(page)}: {picture}"


def test_count(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{count()}")  # noqa: T201
