"""Type checkers accept correct calls of the client and refuse misspelt ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import emender
from emender.parameters import ApplyFields
from emender.schemas.checkpoints import ApplyCreate

SOURCES = Path(emender.__file__).parents[1]
CALLS = """
from uuid import UUID
from emender import AsyncClient, Client, Destination, StageOneSettings
from emender.schemas.edits import EditOut
client = Client()
edit: EditOut = client.edits.create("m", source="dog", destination="robot", settings=StageOneSettings(seed=1))
client.edits.create("m", source="dog", destination=Destination(erase=True, neutral="art"), labels={"ticket": "A-1"})
client.checkpoints.apply("m", edits="ready", alias="production", moment_weight=4000)
client.checkpoints.apply("m", edits=[edit.id], from_="v3")
for other in client.edits.list(model="m", state="ready"):
    other.source.upper()
async def create(client: AsyncClient) -> UUID:
    created: EditOut = await client.edits.create("m", source="dog", destination="robot")
    async for other in client.edits.list():
        other.source.upper()
    return created.id
"""
MISTAKES = {
    'client.edits.create("m", sorce="dog", destination="robot")': 'Unexpected keyword argument "sorce"',
    'client.edits.create("m", source="dog")': 'Missing named argument "destination"',
    'client.edits.create("m", source="dog", destination=Destination(eraze=True))': '"eraze"',
    'client.edits.create("m", source="dog", destination="cat", settings=StageOneSettings(seeed=1))': '"seeed"',
    'client.edits.list(state="rdy")': "incompatible type",
    'client.checkpoints.apply("m", edits="rdy")': "incompatible type",
    'client.checkpoints.apply("m", edits="ready", momentweight=1)': 'Unexpected keyword argument "momentweight"',
    'client.webhooks.create("https://a.example", events=["edit.rdy"])': "incompatible type",
    "client.edits.get(1).sorce": '"EditOut" has no attribute "sorce"',
}


def check(folder: Path, text: str) -> list[str]:
    """Run `mypy --strict`, as a user without our settings does. Return its errors."""
    script = folder / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={folder / 'cache'}", "script.py"],
        cwd=folder,
        env={"MYPYPATH": str(SOURCES), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return re.findall(r"^script\.py:(\d+: error: .*)$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_mypy_accepts_correct_calls_and_refuses_misspelt_ones(tmp_path: Path) -> None:
    errors = check(tmp_path, CALLS + "\n".join(MISTAKES))
    first = CALLS.count("\n") + 1
    for line, (call, error) in enumerate(MISTAKES.items(), start=first):
        assert any(found.startswith(f"{line}: ") and error in found for found in errors), (call, errors)
    assert [error for error in errors if int(error.partition(":")[0]) < first] == []


def test_arguments_of_apply_are_the_fields_of_the_request() -> None:
    fields = {field.alias or name for name, field in ApplyCreate.model_fields.items()}
    assert {name.removesuffix("_") for name in ApplyFields.__annotations__} == fields - {"dry_run"}
