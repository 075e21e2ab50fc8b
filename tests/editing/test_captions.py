"""Read each caption format, and name the place of what is wrong in a file."""

import builtins
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from editing.captions import read_captions
from editing.errors import CaptionsUnreadable

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


EXPECTED = ["a cat", "a “fox”, resting", "Käfer"]
KARPATHY = [{"sentences": [{"tokens": [], "raw": text} for text in part]} for part in (EXPECTED[:2], EXPECTED[2:])]
TWO_KEYS = [{"id": n, "text": caption} for n, caption in enumerate(["a cat", "", "a “fox”, resting", "Käfer"])]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", "a cat\n\n  \n a “fox”, resting \r\nKäfer"),
        ("mark.txt", "\ufeffa cat\na “fox”, resting\nKäfer\n"),
        ("SHOUTED.TXT", "\n".join(EXPECTED)),
        ("table.csv", 'id,caption\n1,a cat\n2,\n3,"a “fox”, resting"\n4,Käfer\n'),
        ("text.csv", 'text,id\na cat,1\n"a “fox”, resting",2\nKäfer,3\n'),
        ("both.csv", 'text,caption\nno,a cat\nno,"a “fox”, resting"\nno,Käfer\n'),
        ("table.tsv", "caption\tid\na cat\t1\na “fox”, resting\t2\nKäfer\t3\n"),
        ("strings.json", json.dumps(EXPECTED)),
        ("objects.json", json.dumps(TWO_KEYS)),
        ("strings.jsonl", "\n".join(json.dumps(caption) for caption in EXPECTED)),
        ("semicolon.csv", "ID;Caption\r\n1;a cat\r\n;\r\n\r\n3;a “fox”, resting\r\n4;Käfer;\r\n"),
        ("excel.csv", "sep=;\r\nCAPTION;id\r\na cat;1\r\na “fox”, resting;2\r\nKäfer;3\r\n"),
        ("tabs.csv", "id\tText \n1\ta cat\n2\ta “fox”, resting\n3\tKäfer\n"),
        ("pipes.txt", "image| caption\nx.jpg| a cat\nx.jpg| a “fox”, resting\ny.jpg| Käfer\n"),
        ("wide.tsv", "\ufeffid\tcaption\n1\ta cat\n2\ta “fox”, resting\n3\tKäfer\n".encode("utf-16-le")),
        ("cc3m.tsv", "".join(f"{caption}\thttp://example.org/{n}\n" for n, caption in enumerate(EXPECTED))),
        ("cc12m.tsv", "".join(f"https://example.org/{n}\t{caption}\n" for n, caption in enumerate(EXPECTED))),
        ("coco.json", json.dumps({"images": [{"id": 1}], "annotations": [{"caption": text} for text in EXPECTED]})),
        ("karpathy.json", json.dumps({"images": KARPATHY, "dataset": "coco"})),
        ("lists.json", json.dumps([{"image": "x.jpg", "caption": EXPECTED[:2]}, {"caption": EXPECTED[2:]}])),
        ("mark.json", "\ufeff" + json.dumps([{"Caption": caption} for caption in EXPECTED])),
        ("objects.ndjson", "\n\n".join(json.dumps(row) for row in TWO_KEYS) + "\n"),
    ],
)
def test_each_format_is_read(write: Write, name: str, content: str | bytes) -> None:
    assert list(read_captions(write(name, content))) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "caption,alt\nno,yes\n"),
        ("a.json", '[{"caption": "no", "alt": "yes"}]'),
        ("a.jsonl", '{"caption": "no", "alt": "yes"}'),
    ],
)
def test_named_column_is_read(write: Write, name: str, content: str) -> None:
    assert list(read_captions(write(name, content), "alt")) == ["yes"]


def test_quoted_csv_caption_may_have_two_lines(write: Write) -> None:
    assert list(read_captions(write("a.csv", 'caption\n"a cat\non a mat"\n'))) == ["a cat\non a mat"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_files_are_streamed(write: Write, name: str) -> None:
    """An error further on is raised only when it is reached."""
    good, bad = ('"a cat"\n', '"a \\ud800"\n') if name == "a.jsonl" else ("a cat\n", "a \0\n")
    captions = read_captions(write(name, ("caption\n" if name == "a.csv" else "") + good + bad))
    assert isinstance(captions, Iterator)
    assert next(captions) == "a cat"
    with pytest.raises(CaptionsUnreadable):
        next(captions)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a cat\n\na \0 dog\n", "a.txt, line 3: a caption must not contain a NUL"),
        ("a.txt", b"a cat\na caf\xe9\n", "a.txt, line 2: a caption must be valid UTF-8"),
        ("a.csv", "caption\na cat\na \0 dog\n", "a.csv, line 3: a caption must not contain a NUL"),
        ("a.csv", b"caption,id\na cat,1\na caf\xe9,2\n", "a.csv, line 3: a caption must be valid UTF-8"),
        ("a.csv", "id,caption\n1,a cat\n2\n", "a.csv, line 3: the row is too short: it has no 'caption'"),
        ("a.csv", "id,caption\n\n1,a cat, a dog\n", "a.csv, line 3: has 3 cells, not 2: a cell with ',' needs quotes"),
        ("a.csv", 'caption\n"a cat\n', "a.csv, line 2: is not valid CSV: "),
        ("a.csv", "id,title\n1,a cat\n", "a.csv, line 1: there is no column 'caption' or 'text': there is id, title"),
        ("a.csv", "", "a.csv, line 1: the table is empty: its first line must name 'caption' or 'text'"),
        ("a.tsv", "http://a\ta cat\n\nhttp://b\n", "a.tsv, line 3: the row is too short"),
        ("a.json", '["a cat", 3]', "a.json, item 2: a caption must be text, not a number"),
        ("a.json", '["a cat", "a \\ud83d dog"]', "a.json, item 2: a caption must be valid UTF-8"),
        ("a.json", '[{"caption": "a cat"}, {"title": "a dog"}]', "a.json, item 2: there is no column"),
        ("a.json", '{"captions": []}', "a.json: must contain a list of captions, COCO's captions or Karpathy's splits"),
        ("a.json", '["a cat",\n3 4]', "a.json, line 2: is not valid JSON: "),
        ("a.json", '{"annotations": [{"bbox": []}]}', "a.json, item 1: there is no column 'caption' or 'text'"),
        ("a.json", '{"images": [{"sentences": [{}]}]}', "a.json, item 1: a caption must be text, not null"),
        ("a.jsonl", '"a cat"\n\n{"caption": null}\n', "a.jsonl, line 3: a caption must be text, not null"),
        ("a.jsonl", '"a cat"\n"a dog\n', "a.jsonl, line 2: is not valid JSON: "),
    ],
)
def test_error_names_the_file_and_the_line(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(CaptionsUnreadable) as caught:
        list(read_captions(write(name, content)))
    assert caught.value.detail.startswith(message)


def test_unknown_suffix_is_refused_at_once(write: Write) -> None:
    with pytest.raises(CaptionsUnreadable, match=r"captions\.xlsx is not one of \.txt, \.csv"):
        read_captions(write("captions.xlsx", b""))


def test_text_file_has_no_columns(write: Write) -> None:
    with pytest.raises(CaptionsUnreadable, match="no columns"):
        list(read_captions(write("a.txt", "a cat"), "caption"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptionsUnreadable, match=r"none\.csv cannot be read: No such file"):
        list(read_captions(tmp_path / "none.csv"))


class TestParquet:
    def test_columns_and_errors(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": [1, 2, 3, 4], "caption": [EXPECTED[0], None, *EXPECTED[1:]], "alt": list("wxyz")})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        assert list(read_captions(tmp_path / "a.parquet")) == EXPECTED
        assert list(read_captions(tmp_path / "a.parquet", "alt")) == list("wxyz")
        with pytest.raises(CaptionsUnreadable, match=r"no column 'title': there is id, caption, alt"):
            list(read_captions(tmp_path / "a.parquet", "title"))
        with pytest.raises(CaptionsUnreadable, match=r"a\.parquet, row 1: a caption must be text, not a number"):
            list(read_captions(tmp_path / "a.parquet", "id"))

    def test_other_files_are_refused(self, write: Write) -> None:
        pytest.importorskip("pyarrow")
        with pytest.raises(CaptionsUnreadable, match=r"a\.parquet: is not a valid parquet file"):
            list(read_captions(write("a.parquet", "a cat\n")))

    def test_error_says_what_to_install(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        importing = builtins.__import__

        def without_pyarrow(name: str, *arguments: object, **options: object) -> object:
            if name.startswith("pyarrow"):
                raise ImportError(name)
            return importing(name, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(builtins, "__import__", without_pyarrow)
        with pytest.raises(CaptionsUnreadable, match="pip install pyarrow"):
            list(read_captions(write("a.parquet", b"")))


def test_torch_and_pyarrow_are_not_imported() -> None:
    code = "import sys, editing; editing.read_captions; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
