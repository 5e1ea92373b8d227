"""Text from files, folders, the standard library and `datasets`; errors name the file and the record."""

import bz2
import glob
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import datasets
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from training.config import FilesSource, HuggingFaceSource, SourceConfig, StdlibSource
from training.data import chunks as text
from training.data import row_files
from training.data.chunks import WORD_START, split_into_chunks, to_document
from training.data.corpus import is_held_out
from training.data.decompress import open_decompressed
from training.data.find_files import expand_glob
from training.data.notes import describe_left_out
from training.data.sources import READERS, build_reader
from training.errors import UserError

TEXTS = ["one\nline", "naïve 日本語 🙂", "third\r\n"]


def read(*paths: Path | str, **options: str) -> list[str]:
    return documents(FilesSource(paths=tuple(map(str, paths)), **options))


def documents(source: object) -> list[str]:
    return ["".join(each.chunks) for each in build_reader(source).documents()]


def jsonl(texts: list, column: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, column: each}).encode() + b"\n" for each in texts)


def test_every_source_has_a_reader():
    variants = {get_args(tagged)[0] for tagged in get_args(get_args(SourceConfig)[0])}
    assert variants == set(READERS)


# --- documents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_with_its_line_ends(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes("über\r\nline\rend\n\n".encode())
    assert read(tmp_path / f"a{suffix}") == ["über\r\nline\rend\n\n"]


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["text"]))
    assert read(tmp_path) == ["text", "text"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: zstandard.compress(data)),
        (".GZ", gzip.compress),
    ],
)
def test_rows_of_jsonl_are_documents_with_every_compression(tmp_path, suffix, compress: Callable[[bytes], bytes]):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(jsonl(TEXTS) + b"\n"))
    assert read(path) == TEXTS


COMPRESSIONS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_all_streams_of_a_compressed_file_are_read_or_it_is_an_error(tmp_path, suffix):
    """Zeros between streams are padding, as .xz allows. Nothing else may follow a stream."""
    path, text = tmp_path / f"a.txt{suffix}", "".join(map(chr, range(33, 400))) * 9
    first, second = (COMPRESSIONS[suffix](part.encode()) for part in ("first ", text))
    for content in (first + second, first + bytes(4) + second + bytes(8), first * 3000 + second):
        path.write_bytes(content)
        assert read(path) == ["first " * content.count(first) + text]
    middle = len(second) // 2
    flipped = second[:middle] + bytes([second[middle] ^ 255]) + second[middle + 1 :]
    damages = {"a bit": flipped, "a cut": second[:-5], "a head": b"x" + second, "garbage": b"garbage", "empty": None}
    for damage, rest in damages.items():
        path.write_bytes(b"" if rest is None else first + rest)
        with pytest.raises(UserError, match=rf"a.txt\{suffix}: (cut short|cannot be read: damaged, or not a)"):
            pytest.fail(f"{damage} was read as {read(path)}")


def test_a_zstd_file_with_the_longest_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # `zstd --long=31` in a pipe
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(b"long window") + stream.flush())
    assert read(tmp_path / "a.txt.zst") == ["long window"]


def test_rows_of_parquet_are_documents_and_null_is_an_empty_one(tmp_path):
    parquet.write_table(pyarrow.table({"body": [*TEXTS, None] * 200}), tmp_path / "a.parquet")
    assert read(tmp_path, text_column="body") == [*TEXTS, ""] * 200


def test_folders_and_globs_are_searched_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.py", "c.bin", ".hidden.txt", "a/__pycache__/x.py", "d.parquet.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/y.py", "a/z.md", "b.txt"]
    assert read(tmp_path / "*.txt", tmp_path / "**" / "[yz].*") == ["b.txt", "a/y.py", "a/z.md"]
    assert read(tmp_path / "a" / "z.md", tmp_path) == ["a/z.md", "a/y.py", "b.txt"]


def test_json_is_an_array_or_lines_and_ndjson_is_jsonl(tmp_path):
    array = json.dumps([{"text": each} for each in TEXTS], indent=1).encode()
    files = {"a.JSON": array, "b.ndjson": jsonl(TEXTS), "c.json": jsonl(TEXTS), "d.json": b"\xef\xbb\xbf \n" + array}
    for name, content in files.items():
        for suffix, compress in {"": bytes, **COMPRESSIONS}.items():
            (tmp_path / f"{name}{suffix}").write_bytes(compress(content))
            assert read(tmp_path / f"{name}{suffix}") == TEXTS


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("far")
    (tmp_path / "near" / "sub").mkdir(parents=True)
    (tmp_path / "near" / "sub" / "b.txt").write_text("near")
    for link, target in {"link": "../far", "again": "../far", "sub/loop": "..", "sub/self": "."}.items():
        (tmp_path / "near" / link).symlink_to(target)
    assert read(tmp_path / "near") == ["far", "near"]
    _, line = describe_left_out([build_reader(FilesSource(paths=(str(tmp_path / "near"),)))])
    assert line.startswith(f"{tmp_path}/near/link and 2 more: leads to a folder that is searched already")
    for pattern in ("near/**", "near/**/*.txt", "**/near/**/*.txt"):
        assert sorted(read(tmp_path / pattern)) == ["far", "near"]


def test_a_recursive_glob_matches_what_the_standard_library_matches(tmp_path):
    places = ("a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.txt", ".hidden/a.txt", "[x]/c/a.txt", "site-packages/c/a.txt")
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    for pattern in ("**/*.txt", "**/a.txt", "**/c/*.txt", "b/**/a.txt", "**/c/**/a.txt", "**"):
        ours = {path for path in expand_glob(tmp_path / pattern) if path.is_file()}
        theirs = set(map(Path, glob.glob(str(tmp_path / pattern), recursive=True)))  # noqa: PTH207 (what is compared)
        assert ours == {path for path in theirs if path.is_file()}, pattern


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt", "*/open/*.txt", "**"])
def test_a_folder_below_that_cannot_be_read_is_an_error_that_names_it(pattern):
    with TemporaryDirectory() as name:  # pytest's own is closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0)
        (folder / "open").mkdir()
        for place in (folder, folder / "open", folder / "open" / "open"):
            place.mkdir(exist_ok=True)
            (place / "a.txt").write_text("text")
        user = os.geteuid()
        os.seteuid(user or 65534)  # everything is readable to root
        try:
            with pytest.raises(UserError, match=r"closed/?: this folder cannot be read: Permission denied"):
                read(folder / pattern)
        finally:
            os.seteuid(user)


def test_what_a_search_leaves_out_is_counted_by_kind(tmp_path):
    for name in (
        "a.txt",
        "b.pdf",
        "c.pdf",
        ".d.txt",
        "README",
        "e.json",
        "site-packages/f.txt",
        "__pycache__/f.txt",
        "g.parquet.gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    kinds = "2 .pdf files, 1 .gz file, 1 .json file, 1 file without an extension, 1 site-packages folder, 1 hidden file"
    for pattern in ("", "**"):
        (line,) = describe_left_out([build_reader(FilesSource(paths=(str(tmp_path / pattern),)))])
        left, _, advice = line.partition(": names must end in .txt")
        assert left.startswith(f"{tmp_path / pattern}: left out 2 .pdf files") and "\n" not in advice
        if not pattern:  # a glob matches no hidden file
            assert sorted(left.split("left out ")[1].split(", ")) == sorted(kinds.split(", "))
    assert list(describe_left_out([build_reader(FilesSource(paths=(str(tmp_path / "a.txt"),)))])) == []


def test_what_several_searches_leave_out_is_counted_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.txt", "sub/b.pdf", "c.pdf"):
        (tmp_path / name).write_text("text")
    (tmp_path / "again").symlink_to(tmp_path)
    paths = (str(tmp_path), str(tmp_path / "sub"), str(tmp_path / "again/sub"))
    line, _ = describe_left_out([build_reader(FilesSource(paths=paths))])
    assert "left out 2 .pdf files, 1 folder searched already: " in line


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("odd name")
    assert read(tmp_path / "a[1].txt") == ["odd name"]


def test_the_standard_library_is_read_without_its_tests():
    source = build_reader(StdlibSource())
    names = [each.key for each in source.documents()]
    assert names == sorted(set(names), key=names.index)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(Path(name).parts)]
    assert 8e6 < sum(path.stat().st_size for path in source.modules.values()) < 20e6


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_are_read_from_folders_of_files(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(jsonl(TEXTS, "body"))
    options = {"name": str(tmp_path / "set"), "text_column": "body", "streaming": streaming}
    assert documents(HuggingFaceSource(**options)) == TEXTS


def test_data_sets_are_read_from_folders_that_datasets_saved(tmp_path):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})
    saved.save_to_disk(str(tmp_path / "dict"))
    saved["train"].save_to_disk(str(tmp_path / "one"))
    for name in ("dict", "one"):
        assert documents(HuggingFaceSource(name=str(tmp_path / name))) == TEXTS
    with pytest.raises(UserError, match=r"dict: no split 'test'; there are train"):
        documents(HuggingFaceSource(name=str(tmp_path / "dict"), split="test"))
    with pytest.raises(UserError, match=r"one: no column 'body'; there are text"):
        documents(HuggingFaceSource(name=str(tmp_path / "one"), text_column="body"))


def test_a_data_set_that_cannot_be_loaded_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^nobody/nothing: cannot be read: [^\n]+$"):
        documents(HuggingFaceSource(name="nobody/nothing"))


# --- errors --------------------------------------------------------------------------------------

BAD = {
    "empty.txt": (b"", "no text in this file: it is empty, or all white space"),
    "lines.txt": (b"\n\r\n \n", "no text in this file: it is empty, or all white space"),
    "lines.jsonl": (b"\n\n\n", "no text in this file: it is empty, or all white space"),
    "blank.jsonl": (jsonl(["", " \n"]), "no text in this file: it is empty, or all white space"),
    "latin.txt": ("aß".encode() * 3 + b"\xe9a", "byte 9 is not UTF-8 text (invalid continuation byte)"),
    "cut.txt": ("aß".encode()[:-1], "byte 1 is not UTF-8 text (unexpected end of data)"),
    "nul.txt": ("ß\0".encode(), "byte 2 is NUL: this is not a UTF-8 text file; if it is UTF-16, set encoding"),
    "utf16.txt": ("text".encode("utf-16"), "byte 0 is not UTF-8 text (invalid start byte); if it is UTF-16, set"),
    "column.jsonl": (jsonl(["a"], "body"), "line 1: no column 'text'; there are id, body (option text_column)"),
    "list.jsonl": (jsonl(["a"]) + b"[1]\n", "line 2: a JSON list, not an object with a 'text'"),
    "number.jsonl": (jsonl(["a", 3]), "line 2: 'text' is int, not text"),
    "surrogate.jsonl": (jsonl(["\ud800"]), "line 1: 'text' is not Unicode text (character 0: surrogates not allowed)"),
    "json.jsonl": (jsonl(["a"]) + b"oops\n{}", "line 2: not JSON (Expecting value: line 1 column 1 (char 0))"),
    "torn.json": (
        json.dumps([{"text": "a"}]).encode()[:-3],
        "not JSON (Unterminated string starting at: line 1 column 11",
    ),
    "item.json": (b'[{"text": "a"}, {"body": "b"}]', "item 1: no column 'text'; there are body (option text_column)"),
    "latin.json": (b'[{"text": "\xff"}]', "byte 11 is not UTF-8 (invalid start byte)"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", "line 1: not JSON (maximum recursion depth exceeded"),
    "torn.jsonl": (jsonl(["abc"])[:-6], "it is the last line: was it cut short?"),
    "utf8.jsonl": (b'{"text": "\xff"}\n', "line 1: byte 10 of the line is not UTF-8 (invalid start byte)"),
    "torn.txt.gz": (gzip.compress(b"text" * 99)[:-9], "cut short: the compressed data end in the middle"),
    "torn.txt.bz2": (bz2.compress(b"text" * 99)[:-9], "cut short: the compressed data end in the middle"),
    "torn.txt.xz": (lzma.compress(b"text" * 99)[:-9], "cut short: the compressed data end in the middle"),
    "torn.jsonl.zst": (zstandard.compress(jsonl(TEXTS))[:-9], "cut short: the compressed data end in the middle"),
    "not.txt.gz": (b"text", "cannot be read: damaged, or not a .gz file ("),
    "not.txt.zst": (b"text" * 9, "cannot be read: damaged, or not a .zst file ("),
    "not.txt.xz": (b"text" * 9, "cannot be read: damaged, or not a .xz file (Input format not supported by decoder)"),
    "not.parquet": (b"text" * 9, "row 0: cannot be read: Parquet magic bytes not found in footer"),
    "void.parquet": (b"", "row 0: cannot be read: Parquet file size is 0 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_file_and_the_record_in_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    line = str(error.value)
    assert line.startswith(f"{tmp_path / name}: ")
    assert message in line
    assert "\n" not in line


def test_damage_within_a_parquet_file_is_reported_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(9999)]}), path, compression="zstd")
    damaged = bytearray(path.read_bytes())
    damaged[200:4000] = bytes(3800)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a.parquet: row \d+: cannot be read: [^\n]+$"):
        read(path)


def test_parquet_that_would_fill_memory_is_an_error_before_it_is_read(tmp_path, monkeypatch):
    rows = pyarrow.table({"text": ["x" * 20_000] * 320})
    parquet.write_table(rows, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert len(read(tmp_path / "a.parquet")) == 320
    monkeypatch.setattr(row_files, "MAX_PAGE_BYTES", 2**20)
    with pytest.raises(UserError, match=r"a.parquet: row group 0: [\d,]{3,6} bytes unpack to 6,40\d,\d+, too many"):
        read(tmp_path / "a.parquet")
    entries = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256, pyarrow.int32()), ["y" * 100_000])
    parquet.write_table(pyarrow.table({"text": entries}), tmp_path / "b.parquet", compression="zstd")
    monkeypatch.setattr(row_files, "MAX_BATCH_BYTES", 250_000)  # two of the rows, each as long as the dictionary
    metadata = parquet.read_metadata(tmp_path / "b.parquet")
    assert row_files.batch_rows(tmp_path / "b.parquet", metadata, "text") == 2
    assert sum(map(len, read(tmp_path / "b.parquet"))) == 25_600_000


def test_columns_of_parquet_are_listed_and_must_hold_text(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1, 2], "tags": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column 'text'; there are id, tags \(option text_column\)$"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"a.parquet: row 0: 'id' is int, not text$"):
        read(tmp_path, text_column="id")


def test_an_error_names_the_row_of_a_parquet_file(tmp_path):
    rows = pyarrow.array([b"text"] * 300 + [b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: row 300: cannot be read: 'utf-8' codec can't decode"):
        read(tmp_path)


def test_an_error_says_why_a_path_has_no_files(tmp_path):
    (tmp_path / "a.bin").write_text("text")
    extensions = r"\.txt, \.md, \.py, \.jsonl, \.parquet"
    for path, why in {
        "none.txt": "no such file or folder",
        "*.txt": rf"the glob matches no usable file \(names that end in {extensions}",
        "": rf"no usable file in this folder \(there are 1 .bin file\): no name ends in {extensions}",
        "a.bin": rf"no usable file: its name does not end in {extensions}",
    }.items():
        with pytest.raises(UserError, match=why):
            read(tmp_path / path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is readable to root")
def test_an_unreadable_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"a.txt: cannot be read: Permission denied"):
        read(tmp_path)


def test_an_empty_file_in_a_folder_is_an_empty_document(tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("pass")
    assert read(tmp_path) == ["", "pass"]


# --- chunks ----------------------------------------------------------------------------------------


@given(
    words=st.lists(st.sampled_from(["word", " ", "\n", "  ", "x\r\n", "é", "日本"]), max_size=200),
    size=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_chunks_do_not_depend_on_the_blocks_that_text_arrives_in(words, size):
    whole = "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_CHARS", 40)
        patch.setattr(text, "MAX_SEARCH_CHARS", 20)
        chunks = list(to_document(whole).chunks)
        assert "".join(chunks) == whole
        assert all(len(chunk) <= 60 for chunk in chunks)
        assert list(split_into_chunks(whole[i : i + size] for i in range(0, len(whole), size))) == chunks


def test_a_document_is_cut_before_a_word():
    assert [match.start() for match in WORD_START.finditer("a b\nc \nd  e\n\nf")] == [1, 4]


def test_characters_across_blocks_are_decoded(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("日本🙂".encode() * 10)
    for size in range(1, 9):
        monkeypatch.setattr(text, "CHUNK_CHARS", size)
        with open_decompressed(tmp_path / "a.txt") as file:
            assert "".join(text.decode_utf8(file, "a.txt")) == "日本🙂" * 10
    (tmp_path / "a.txt").write_bytes("日本🙂".encode() * 10 + b"\xff")
    for size in range(1, 9):
        monkeypatch.setattr(text, "CHUNK_CHARS", size)
        with (
            open_decompressed(tmp_path / "a.txt") as file,
            pytest.raises(UserError, match=r"a.txt: byte 100 is not UTF-8"),
        ):
            list(text.decode_utf8(file, "a.txt"))


def test_text_after_white_space_of_any_length_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_CHARS", 10)
    monkeypatch.setattr(text, "MAX_SEARCH_CHARS", 5)
    (tmp_path / "a.txt").write_text(" \n" * 50 + "text")
    assert read(tmp_path / "a.txt") == [" \n" * 50 + "text"]
    monkeypatch.setattr(text, "MAX_BLANK_BYTES", 60)
    with pytest.raises(UserError, match=r"a.txt: begins with 0 MiB of white space; remove it"):
        read(tmp_path / "a.txt")


# --- held out --------------------------------------------------------------------------------------


def test_a_larger_fraction_holds_out_all_that_a_smaller_one_does():
    keys = [str(i) for i in range(5000)]
    smaller = {key for key in keys if is_held_out(key, 0.02)}
    larger = {key for key in keys if is_held_out(key, 0.1)}
    assert smaller < larger
    assert 70 < len(smaller) < 130
    assert 420 < len(larger) < 580
    assert not any(is_held_out(key, 0.0) for key in keys)
    assert all(is_held_out(key, 1.0) for key in keys)


# --- docs/playbooks/add_a_data_source.md -------------------------------------------------------------
