"""The comparison of shown and printed output lets through what may differ, and nothing else."""

from pathlib import Path

import pytest

from tests.docs.pages import OUTPUT, PART, Block, blocks, difference

ID = "01a21020-4254-7754-842c-39160830e264"


def shown(text: str, *, title: str) -> Block:
    return Block(Path("page.md"), 1, "text", title, text)


@pytest.mark.parametrize(
    ("text", "printed", "same"),
    [
        ("shop ready\n", "shop ready\n", True),
        ("shop ready\n", "shop failed\n", False),
        ("shop ready\n", "warning\nshop ready\n", False),
        (f"{ID} ready\n", f"{ID[:-1]}0 ready\n", True),
        (f"{ID} ready\n", "nothing ready\n", False),
        ("… events, whole\n", "44 events, whole\n", True),
        ("… events, whole\n", "44 events, broken\n", False),
    ],
)
def test_text(text: str, printed: str, *, same: bool) -> None:
    assert (difference(shown(text, title=OUTPUT), printed) is None) == same


@pytest.mark.parametrize(
    ("text", "printed", "same"),
    [
        ('{"a": 1}', '{"a": 1, "b": 2}', True),
        ('{"a": 1}', '{"b": 2}', False),
        ('{"a": 0.02}', '{"a": 0.03}', True),
        ('{"a": 0.02}', '{"a": 0.3}', False),
        ('{"a": [{"b": 1}]}', '{"a": [{"b": 1, "c": 2}, {}]}', True),
        ('{"a": [{"b": 1}]}', '{"a": []}', False),
        ('{"a": []}', '{"a": [1]}', False),
        ('{"a": true}', 'said before: {"a": false}', False),
    ],
)
def test_part_of_json(text: str, printed: str, *, same: bool) -> None:
    assert (difference(shown(text, title=PART), printed) is None) == same


def test_blocks_and_their_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```sh\n# a note\nfor i in 1 2; do\n    echo $i\ndone\nemender apply \\\n    --wait\n```\n\n"
        '```text title="Output"\n1\n```\n\n```sh title="Not run here: needs a GPU"\nnvidia-smi\n```\n'
        "\n```sh\nmake test\n```\n"
    )
    first, output, apart, make = blocks(page)
    assert (first.line, first.runs, first.makes) == (3, True, False)
    assert [command.split()[0] for command in first.commands] == ["for", "emender"]
    assert (output.title, output.runs, apart.runs, make.runs, make.makes) == ("Output", False, False, False, True)
