"""Captions are read from every format that `emender statistics create` documents."""

import json
from pathlib import Path

import pytest

from emender.captions import read_captions

CAPTIONS = ["a cat", "a red, red rose", "die Straße"]
TABLE = 'id,caption\n1,a cat\n2,"a red, red rose"\n3,\n4, die Straße \n'
FILES = {
    "a.txt": "a cat\n\na red, red rose\n  die Straße  ",
    "a.csv": TABLE,
    "bom.csv": "\ufeff" + TABLE,
    "a.tsv": "text\na cat\na red, red rose\n\ndie Straße\n",
    "a.json": json.dumps([{"caption": "a cat"}, "a red, red rose", {"caption": "die Straße"}]),
    "a.jsonl": '{"caption": "a cat"}\n\n"a red, red rose"\n{"caption": "die Straße"}\n',
    "a.ndjson": '"a cat"\n"a red, red rose"\n"die Straße"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_captions_are_read_from_each_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert list(read_captions(tmp_path / name)) == CAPTIONS


def test_captions_are_read_from_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"caption": [*CAPTIONS, None], "alt": list("wxyz")}), tmp_path / "a.parquet")
    assert list(read_captions(tmp_path / "a.parquet")) == CAPTIONS
    assert list(read_captions(tmp_path / "a.parquet", "alt")) == list("wxyz")


def test_named_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("caption,alt\nno,yes\n")
    assert list(read_captions(tmp_path / "a.csv", "alt")) == ["yes"]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", "id,title\n1,a cat\n", "a.csv, caption 1: there is no column 'caption' or 'text'"),
        ("a.csv", "caption\na cat\na \0 dog\n", "a.csv, caption 2: a caption must not contain a NUL character"),
        ("a.csv", 'caption\na cat\n"a dog\n', "a.csv, caption 2: "),
        ("a.csv", "id,caption\n1,a cat\n2\n", "a.csv, caption 2: a caption must be text"),
        ("a.json", '{"caption": "a cat"}', "a.json, caption 1: the file must contain a list"),
        ("a.json", "[1]", "a.json, caption 1: a caption must be text"),
        ("a.json", "[", "a.json, caption 1: "),
        ("a.jsonl", '"a cat"\n{"caption": null}\n', "a.jsonl, caption 2: a caption must be text"),
        ("a.xlsx", "", "a.xlsx, caption 1: the suffix must be one of .txt, .csv"),
    ],
)
def test_invalid_captions_are_errors_that_name_the_place(name: str, content: str, error: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as raised:
        list(read_captions(tmp_path / name))
    assert str(raised.value).startswith(error)


def test_invalid_utf8_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a cat\n" * 5_000 + b"a \xff dog\n")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 after caption \d+"):
        list(read_captions(tmp_path / "a.txt"))
