"""Check prose and names against `docs/words.toml`: `python -m docs._generate.prose [PATH…]`.

Prose is what people read: Markdown, docstrings, comments and messages in strings. Code in backticks is left out. The
matching is proselint's, over a word list of our own. Exits with 1 where it finds something.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from proselint.registry.checks import Check, engine, types

WORDS = Path(__file__).parents[1] / "words.toml"
SKIPPED = (
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "demo/weights/",
    "migrations/versions/000",
    "migrations/versions/001",
    "tests/docs/_generate/test_prose.py",
)
MESSAGE = re.compile(r"\w+(?:[ ,]+\S+){3}")  # a string of at least four words
SQL = re.compile(r"\b(?:SELECT|INSERT INTO|UPDATE|ALTER TABLE|CREATE) ")
CODE = re.compile(r"```.*?```|~~~.*?~~~|`[^`\n]+`|\{[^{}\n]*\}|https?://\S+|\]\([^)\n]*\)", re.DOTALL)
SENTENCE = re.compile(r"[^.!?:;|\n]+(?:\n(?!\s*\n|\s*[-*|#>\d])[^.!?:;|\n]+)*")
WORD = re.compile(r"[A-Za-z][\w'’-]*")

Finding = tuple[int, str]
"""A line number, counted from 1, and what is wrong there."""


@cache
def load_words() -> dict[str, Any]:
    return tomllib.loads(WORDS.read_text())


@cache
def build_checks() -> tuple[Check, ...]:
    """Return proselint checks for the preferred terms and for the phrases to avoid."""
    words = load_words()
    fast = engine.Fast(opts=engine.RegexOptions(case_insensitive=True))
    prefer = types.PreferredFormsSimple(items=words["prefer"])
    checks = [Check(check_type=prefer, path="emender.prefer", message="Write '{}' instead of '{}'.", engine=fast)]
    for pattern in words["avoid"]["patterns"]:
        avoid = types.ExistenceSimple(pattern=pattern)
        fancy = engine.Fancy(opts=engine.RegexOptions(case_insensitive=True))
        checks.append(Check(check_type=avoid, path="emender.avoid", message="Rewrite without '{}'.", engine=fancy))
    return tuple(checks)


def read_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each piece of prose of a file with the number of its first line."""
    text = path.read_text()
    if path.suffix == ".md":
        yield 1, text
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:", "# fmt", "#!")):
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if SQL.search(node.value) or not MESSAGE.search(node.value):
                continue
            yield node.lineno, node.value


def read_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the module's name and the names of its functions, classes and class attributes."""
    yield 1, path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.lineno, field.target.id


def blank_code(text: str) -> str:
    """Replace code and links by spaces, so that positions stay."""
    return CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def check_prose(path: Path) -> Iterator[Finding]:
    """Yield the words to replace, the phrases to avoid and the sentences that are too long."""
    longest = load_words()["max_sentence_words"]
    for first, text in read_prose(path):
        prose = blank_code(text)
        for check in build_checks():
            for result in check.check_with_flags(f"\n{prose}\n"):
                yield first + prose.count("\n", 0, max(result.span[0] - 1, 0)), result.message
        for sentence in SENTENCE.finditer(prose):
            if (count := len(WORD.findall(sentence[0]))) > longest:
                line = first + prose.count("\n", 0, sentence.start())
                yield line, f"A sentence of {count} words: split it (at most {longest})."


def check_names(path: Path) -> Iterator[Finding]:
    """Yield the names that the word list refuses."""
    refused = set(load_words()["names"]["patterns"])
    for line, name in read_names(path):
        if name in refused:
            yield line, f"The name '{name}' is not used any more."


def main(arguments: list[str]) -> int:
    """Check the tracked files below the given paths; without any, below the current folder."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", *arguments], capture_output=True, text=True, check=True)
    count = 0
    for name in filter(None, listed.stdout.split("\0")):
        path = Path(name)
        if path.suffix not in (".md", ".py") or name.startswith(SKIPPED) or not path.exists():
            continue
        findings = set(check_prose(path))
        if path.suffix == ".py":
            findings |= set(check_names(path))
        for line, message in sorted(findings):
            print(f"{name}:{line}: {message}")  # noqa: T201
        count += len(findings)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
