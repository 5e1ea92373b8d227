"""Files of rows: CSV and TSV, what a searched folder reads of them, and where evaluation and tasks read them."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import ClozeTask, FilesSource
from training.data import Tokenizer, row_files
from training.data.dataset import read_split
from training.data.items import read_items
from training.data.notes import describe_left_out
from training.data.sources import build_reader
from training.data.text_files import read_rows
from training.data.tokenizer import build_byte_tokenizer
from training.errors import UserError

TEXTS = ["one, two\nline", 'naïve "quoted" 日本語', "third\r\n\ttab", "", " "]


def table(rows: list[list[str]], delimiter: str = ",", **options: object) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, **options).writerows(rows)
    return text.getvalue().encode()


def reader_of(*paths: Path, **options: str):
    return build_reader(FilesSource(paths=tuple(map(str, paths)), **options))


def read(*paths: Path, **options: str) -> list[str]:
    return ["".join(each.chunks) for each in reader_of(*paths, **options).documents()]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.CSV.gz", "a.tsv.gz"])
def test_a_table_has_a_document_a_row(tmp_path, name):
    content = table([["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS))], "\t" if "tsv" in name else ",")
    for start in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(start + content))
        assert read(tmp_path / name) == TEXTS
        assert [row["id"] for _, row in read_rows(tmp_path / name)] == list("01234")


@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\0", codec="utf-8")), st.text("\"',\n\r\t x"))))
@settings(max_examples=40, deadline=None)
def test_what_a_writer_wrote_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    path.write_bytes(table([["one", "two"], *map(list, rows)], quoting=csv.QUOTE_ALL))
    assert [tuple(row.values()) for _, row in read_rows(path)] == rows


def test_a_huge_field_is_read_and_memory_does_not_grow_with_the_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(table([["text"], ["x" * 3_000_000]]))
    assert list(map(len, read(tmp_path / "a.csv"))) == [3_000_000]
    (tmp_path / "b.csv").write_bytes(table([["text"], *[["y" * 1000]] * 20_000]))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "b.csv")) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


BAD = {
    "short.csv": (b'id,text\n1,"a\nb"\n2\n', "row 2 (line 4): 1 fields, but the header row has 2"),
    "long.tsv": (b"id\ttext\n1\ta\tb\n", "row 1 (line 2): 3 fields, but the header row has 2"),
    "column.csv": (
        b"id,body\n1,a\n",
        "line 1: no column 'text'; there are id, body (option text_column); the first row",
    ),
    "headless.csv": (
        b"1," + b"word " * 99 + b"\n2,b\n",
        f"line 1: no column 'text'; there are 1, {('word ' * 8)}... (option text_column); the first row must name the",
    ),
    "double.csv": (b"text,text\na,b\n", "line 1: two columns have the name 'text'; rename one"),
    "open.csv": (b'text\n"a\nb\n', "line 2: the row cannot be read (unexpected end of data)"),
    "quote.csv": (b'text\n"a" b\n', "line 2: the row cannot be read (',' expected after '\"')"),
    "utf8.csv": (b"text\na\n\xff\n", "line 3: byte 0 of the line is not UTF-8 (invalid start byte)"),
    "nul.csv": (b"text\na\n\0\n", "line 3: byte 0 of the line is NUL"),
    "cut.csv.gz": (gzip.compress(b"text\na\n" * 99)[:-9], "cut short: the compressed data end in the middle"),
    "empty.csv": (b"", "no text in this file: it is empty, or all white space"),
    "header.csv": (b"text\n", "no text in this file: it is empty, or all white space"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_file_and_the_row_in_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_without_an_end_is_an_error_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 1 << 20)
    for end in (b"\n", b""):
        (tmp_path / "a.csv").write_bytes(b'text\nfirst\n"' + (b"open" * 9 + end) * 40_000)
        with pytest.raises(UserError, match=r"a.csv: line 3: the row is longer than 1 MiB.*; is a quote not closed\?$"):
            read(tmp_path / "a.csv")


def test_a_searched_folder_reads_tables_with_the_column_and_packed_json(tmp_path):
    """Folders of code have package.json and tables of numbers, which hold no text."""
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(table([["text" if name == "a.csv" else "n"], ["from a table"]]))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'{"text": "from a packed file"}\n'))
    (tmp_path / "package.json").write_text('{"name": "no text"}')
    assert read(tmp_path) == ["from a table", "from a packed file"]
    (line,) = describe_left_out([reader_of(tmp_path)])
    assert "left out 2 .csv files without the text_column, 1 .json file: " in line
    with pytest.raises(UserError, match=r"b.csv: line 1: no column 'text'; there are n "):
        read(tmp_path / "*.csv")
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.csv").rename(tmp_path / "sub" / "b.csv")
    with pytest.raises(
        UserError, match=r"no usable file in this folder \(there are 1 .csv file without the text_column"
    ):
        read(tmp_path / "sub")


def test_evaluation_and_tasks_read_tables(tmp_path):
    rows = [["text", "n"], ["the cat sat", "1"], ["on the mat", "2"]]
    (tmp_path / "a.csv").write_bytes(table(rows))
    (tmp_path / "b.tsv").write_bytes(table(rows, "\t"))
    (tmp_path / "c.json.gz").write_bytes(
        gzip.compress(json.dumps([{"text": "the cat sat"}, {"text": "on the mat"}]).encode())
    )
    (tmp_path / "tokenizer").mkdir()
    build_byte_tokenizer().save(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    for name in ("a.csv", "b.tsv", "c.json.gz"):
        items = read_items(ClozeTask(paths=(str(tmp_path / name),)))
        assert [(item.context, item.answers) for item in items] == [("the cat", ("sat",)), ("on the", ("mat",))]
        split = read_split([str(tmp_path / name)], tokenizer)
        assert (split.n_documents, split.n_bytes) == (2, 21)
