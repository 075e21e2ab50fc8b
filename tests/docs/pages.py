"""The fenced blocks of the documentation, and what is done with each.

| block | what is done |
|---|---|
| `sh`, `python` | run, page by page, in one shell and in the page's order |
| any, titled by a file's name | written to that file |
| after one that ran, titled `Output` | what that one printed; `…` is anything, an id, hash or time any other |
| … titled `Output, in part` | the same of JSON: what is shown must be there, numbers within 0.05 |
| `sh` that calls nothing but make | its targets are in the Makefile |
| any, titled `Not run here: …` | parsed |
| other languages | parsed |
| without a language | the commands by which figures were measured: their options exist |

`python -m tests.docs.pages` counts them.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
RECORDED = re.compile(r"^((?:\w+=\S+ )*(?:\S*python|make) .*)$", re.MULTILINE)
RUN = ("sh", "python")
OUTPUT, PART, NOT_RUN = "Output", "Output, in part", "Not run here: "
FILE = re.compile(r"[\w./-]+\.\w+")
ANY = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # an id
    r"|\b(?:[0-9a-f]{64}|[0-9a-f]{40})\b"  # a hash
    r"|\d{4}-\d\d-\d\dT[\d:.]+Z"  # a time
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.title and not self.makes

    @property
    def makes(self) -> bool:
        """Whether it calls nothing but make, as the reader does once and CI does elsewhere."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return self.language == "sh" and not self.title and all(line.startswith("make ") for line in lines)

    @property
    def file(self) -> str | None:
        """The name of the file that it is the content of."""
        return self.title if FILE.fullmatch(self.title) else None

    @property
    def commands(self) -> list[str]:
        """Its statements: one each for a pipe or a loop, and for a whole Python block."""
        if self.language != "sh":
            return [self.text]
        found, sofar = [], ""
        for line in self.text.splitlines(keepends=True):
            sofar += line
            if sofar.strip() and not sofar.rstrip().endswith("\\") and shell_error(sofar) is None:
                found.append(sofar)
                sofar = ""
        return [command for command in found if not command.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks in their order."""
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") + text.startswith("```") == 2 * len(FENCE.findall(text)), f"{page}: a fence that is odd"
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match["language"], match["title"] or "", match["text"])
        for match in FENCE.finditer(text)
    ]


def recorded(page: Path) -> Iterator[str]:
    """Yield the commands in blocks without a language: how the figures of a page were measured."""
    for block in blocks(page):
        if not block.language:
            yield from RECORDED.findall(block.text)


def parse(block: Block) -> str | None:
    """What is wrong with the block as its language; None where nothing is."""
    try:
        match block.language:
            case "sh":
                return shell_error(block.text)
            case "python":
                ast.parse(block.text)
            case "json" if not block.title.startswith(OUTPUT):
                for document in block.text.splitlines() if block.title.endswith(".ndjson") else [block.text]:
                    json.loads(document)
            case "json":
                json.loads(block.text)
            case "yaml":
                list(yaml.safe_load_all(block.text))
            case "" | "csv" | "text" | "http" | "ini" | "toml" | "promql" | "console":  # console: a synopsis
                pass
            case language:
                return f"nothing is known of the language {language!r}"
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        return str(error)
    return None


def shell_error(text: str) -> str | None:
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return checked.stderr or None


def difference(shown: Block, printed: str) -> str | None:
    """Where what was printed is not what the page shows; None where it is."""
    if shown.title == PART:
        start = printed.find("{")
        return _lacks(json.loads(shown.text), json.loads(printed[start:]), at="")
    parts = (re.escape(part) for part in ANY.sub("⟨any⟩", shown.text.strip()).split("…"))
    if re.fullmatch(".*?".join(parts), ANY.sub("⟨any⟩", printed.strip()), re.DOTALL):
        return None
    return f"shown:\n{shown.text}\nprinted:\n{printed}"


def _lacks(shown: Any, found: Any, *, at: str) -> str | None:
    match shown, found:
        case dict(), dict():
            parts = [(f"{at}/{name}", value, found.get(name)) for name, value in shown.items()]
        case list(), list() if len(shown) <= len(found) and (shown or not found):
            parts = [(f"{at}/{n}", value, found[n]) for n, value in enumerate(shown)]
        case float(), float() | int() if abs(shown - found) <= 0.05:
            parts = []
        case _ if shown == found:
            parts = []
        case _:
            return f"{at}: {shown!r} is shown, {found!r} was found"
    return next(filter(None, (_lacks(value, of, at=where) for where, value, of in parts)), None)


def count() -> str:
    every = [block for page in PAGES for block in blocks(page)]
    ran = sum(len(block.commands) for block in every if block.runs)
    compared = sum(block.title.startswith(OUTPUT) for block in every)
    makes = sum(len(block.commands) for block in every if block.makes)
    apart = sum(len(block.commands) for block in every if block.title.startswith(NOT_RUN))
    records = sum(1 for page in PAGES for _ in recorded(page))
    return (
        f"{ran} commands are run by tests/docs and {compared} outputs compared; {makes} calls of make are looked up, "
        f"{apart} commands that cannot run here and {records} of measurements are parsed"
    )


if __name__ == "__main__":
    sys.stdout.write(count() + "\n")
