"""Options of a source: encoding, split_on and limit; and the cache keys of sources without them."""

import json
from pathlib import Path

import datasets
import pytest
from pydantic import ValidationError

from training.config import DataConfig, FilesSource, HuggingFaceSource, LimitConfig
from training.data import chunks as text
from training.data import prepare
from training.data.corpus import Corpus
from training.data.file_hashes import FileHashes
from training.data.limits import Budget
from training.data.sources import build_reader
from training.errors import UserError


def read(source: FilesSource) -> list[str]:
    return ["".join(each.chunks) for each in build_reader(source).documents()]


def config_of(folder: Path, *sources: dict, **options: object) -> DataConfig:
    default = {"tokenizer": {"type": "byte"}, "cache_dir": str(folder / "cache"), "workers": 1, "val_fraction": 0.2}
    return DataConfig.model_validate(default | {"sources": list(sources)} | options)


def texts(dataset, split: str) -> list[str]:
    """Return the documents of a split, read back from disk."""
    return [
        dataset.tokenizer.decode(stream.tokens[int(start) + 1 : int(end)])
        for stream in getattr(dataset, split).streams
        for start, end in zip(stream.documents, [*stream.documents[1:], len(stream.tokens)], strict=True)
    ]


def key_of(config: DataConfig, folder: Path) -> str:
    return Corpus(config).cache_key(FileHashes(folder / "digests.json"))


def jsonl(path: Path, *documents: str) -> Path:
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return path


# --- encoding --------------------------------------------------------------------------------------

LETTERS = "Ärger, naïve: 日本語\n" * 9000  # more than a block


@pytest.mark.parametrize("encoding", ["utf-16", "UTF-16LE", "shift_jis", "gb18030", "utf-7", "iso2022_jp_2", "utf-32"])
def test_text_in_any_encoding_is_read(tmp_path, encoding):
    expected = LETTERS if encoding not in ("shift_jis",) else LETTERS.replace("Ä", "a").replace("ï", "i")
    content = expected.encode(encoding)
    (tmp_path / "a.txt").write_bytes(content)
    assert read(FilesSource(paths=(str(tmp_path / "a.txt"),), encoding=encoding)) == [expected]
    rows = "text,n\n" + "".join(f'"{word}",1\n' for word in expected.split(", ")[:3])
    (tmp_path / "a.csv").write_bytes(rows.encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": expected}, ensure_ascii=False).encode(encoding))
    assert read(FilesSource(paths=(str(tmp_path / "a.csv"),), encoding=encoding)) == expected.split(", ")[:3]
    assert read(FilesSource(paths=(str(tmp_path / "a.jsonl"),), encoding=encoding)) == [expected]


@pytest.mark.parametrize(
    "name", ["rot13", "zip", "base64", "hex", "unicode_escape", "idna", "undefined", "nope", "", "\0"]
)
def test_a_codec_that_is_no_text_encoding_is_an_error(name):
    with pytest.raises(ValidationError, match=r"is no text encoding that Python knows; try utf-16, cp1252 or latin-1"):
        FilesSource(paths=("a.txt",), encoding=name)


def test_an_error_about_bytes_names_the_option(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xe9c")
    with pytest.raises(
        UserError, match=r"a.txt: byte 2 is not UTF-8 text \(.*\); set encoding of the source to the right"
    ):
        read(FilesSource(paths=(str(tmp_path / "a.txt"),)))
    assert read(FilesSource(paths=(str(tmp_path / "a.txt"),), encoding="latin-1")) == ["abéc"]
    for encoding, message in {
        "ascii": r"byte 2 is not ascii text \(ordinal not in range\(128\)\)",
        "euc_jp": r"byte 2 is not euc_jp text \(illegal multibyte sequence\)",
        "utf-32": "not utf-32 text|byte 0 is not utf-32 text",
    }.items():
        with pytest.raises(UserError, match=rf"a.txt: ({message}).*; check encoding of the source$"):
            read(FilesSource(paths=(str(tmp_path / "a.txt"),), encoding=encoding))
    (tmp_path / "long.txt").write_bytes(b"x" * 200_000 + b"\xff")
    with pytest.raises(UserError, match=r"long.txt: byte 200000 is not ascii text"):
        read(FilesSource(paths=(str(tmp_path / "long.txt"),), encoding="ascii"))


def test_files_that_are_not_utf8_are_left_out_whole_and_counted(tmp_path):
    """The wrong byte comes after a block of good text, of which nothing is read."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "bad.txt").write_bytes(b"good " * 500_000 + b"\xff")
    (tmp_path / "text" / "nul.txt").write_bytes(b"a\0")
    (tmp_path / "text" / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    jsonl(tmp_path / "text" / "good.jsonl", *(f"document {i}" for i in range(40)))
    source = {"paths": [str(tmp_path / "text")], "encoding": "skip"}
    for _ in range(2):  # built, and from the cache
        dataset = prepare(config_of(tmp_path, source), quiet=True)
        assert "files that are not UTF-8, left out (encoding: skip): 3" in dataset.report["notes"]
    assert sorted(texts(dataset, "train") + texts(dataset, "val")) == sorted(f"document {i}" for i in range(40))
    for path in (tmp_path / "text" / "bad.txt", tmp_path / "text" / "bad*"):
        with pytest.raises(UserError, match=r"bad.*: no file is UTF-8; set encoding to the right one"):
            prepare(config_of(tmp_path, source | {"paths": [str(path)]}), quiet=True)


# --- split_on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py"])
@pytest.mark.parametrize("chunk", [1 << 20, 16], ids=["one chunk", "many chunks"])
def test_any_text_file_is_split_on_what_a_source_names(tmp_path, monkeypatch, name, chunk):
    """In small chunks, cuts go through separators."""
    monkeypatch.setattr(text, "CHUNK_CHARS", chunk)
    monkeypatch.setattr(text, "MAX_SEARCH_CHARS", 2)
    parts = ["first text\n", "\nsecond <|endoftext|> text\n", "a<b>c" * 9, "", "last"]
    for separator in ("<|endoftext|>", "\n=====\n", " .*+ ", "\n\n"):
        documents = [part.replace(separator, "") for part in parts]
        (tmp_path / name).write_text(separator.join(documents))
        (tmp_path / "b.txt").write_text("x<|endoftext|>y")
        sources = [{"paths": [str(tmp_path / name)], "split_on": separator}, {"paths": [str(tmp_path / "b.txt")]}]
        dataset = prepare(config_of(tmp_path, *sources, val_sources=sources[1:]), quiet=True)
        separated = [each for each in separator.join(documents).split(separator) if each.strip()]
        assert texts(dataset, "train") == [*separated, "x", "y"]
        n_borders = separator.join(documents).count(separator) + 2
        line = f"{separator!r} (split_on), <|endoftext|> in .txt files: {n_borders}, "
        assert any(note.startswith(line) for note in dataset.report["notes"])
        if separator != "<|endoftext|>" and chunk > 16:
            as_text = "<|endoftext|> in the text: 1, as ordinary characters; it separates documents in .txt files of"
            assert any(note.startswith(as_text) for note in dataset.report["notes"])


def test_a_separator_that_is_nowhere_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("a\n===\nb")
    source = {"paths": [str(tmp_path / "a.txt")], "split_on": "===\\n"}
    dataset = prepare(config_of(tmp_path, source, val_sources=[source]), quiet=True)
    assert dataset.report["notes"][0] == "'===\\\\n' (split_on): nowhere in the text, which is not split"


def test_a_separator_in_md_and_rows_that_is_not_split_on_is_said(tmp_path):
    (tmp_path / "a.md").write_text("a<|endoftext|>b")
    jsonl(tmp_path / "b.jsonl", "c<|endoftext|>d")
    source = {"paths": [str(tmp_path / "*.*")]}
    dataset = prepare(config_of(tmp_path, source, val_sources=[source]), quiet=True)
    assert dataset.report["notes"][0] == (
        "<|endoftext|> in the text: 4, as ordinary characters; it separates documents in .txt files only, or where "
        "split_on names it"
    )


def test_split_on_without_a_text_file_is_an_error(tmp_path):
    jsonl(tmp_path / "a.jsonl", "text")
    with pytest.raises(
        UserError, match=r"a.jsonl: split_on has no effect: it separates documents of .txt, .md and .py"
    ):
        read(FilesSource(paths=(str(tmp_path / "a.jsonl"),), split_on="x"))


# --- limit -----------------------------------------------------------------------------------------

DOCUMENTS = ["ab", " ", "cdé", "f" * 6, "gh"]


@pytest.mark.parametrize(
    ("limit", "n"),
    [
        ({"documents": 1}, 1), ({"documents": 2}, 2), ({"documents": 9}, 4),
        ({"bytes": 2}, 1), ({"bytes": 3}, 2), ({"bytes": 6}, 2), ({"bytes": 7}, 3), ({"bytes": 99}, 4),
        ({"tokens": 3}, 1), ({"tokens": 4}, 2), ({"tokens": 8}, 2), ({"tokens": 9}, 3), ({"tokens": 99}, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "dump.txt"])
def test_a_limit_keeps_whole_documents_up_to_the_one_that_reaches_it(tmp_path, limit, n, name):
    """A byte is a token here. Blank documents do not count."""
    jsonl(tmp_path / "a.jsonl", *DOCUMENTS)
    (tmp_path / "dump.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    val = {"paths": [str(jsonl(tmp_path / "val.jsonl", "v", "w"))]}
    config = config_of(tmp_path, {"paths": [str(tmp_path / name)], "limit": limit}, val_sources=[val])
    dataset = prepare(config, quiet=True)
    assert texts(dataset, "train") == [each for each in DOCUMENTS if each.strip()][:n]
    assert texts(dataset, "val") == ["v", "w"]


def test_each_source_has_its_own_limit(tmp_path):
    sources = [
        {
            "paths": [str(jsonl(tmp_path / f"{name}.jsonl", *(f"{name} {i}" for i in range(9))))],
            "limit": {"documents": n},
        }
        for name, n in {"a": 3, "b": 5}.items()
    ]
    dataset = prepare(config_of(tmp_path, *sources, val_sources=sources[:1]), quiet=True)
    assert texts(dataset, "train") == [f"a {i}" for i in range(3)] + [f"b {i}" for i in range(5)]
    assert texts(dataset, "val") == [f"a {i}" for i in range(3)]
    many = {"paths": [str(tmp_path / "[ab].jsonl")], "limit": {"documents": 12}}
    dataset = prepare(config_of(tmp_path, many), quiet=True)
    assert len(texts(dataset, "train") + texts(dataset, "val")) == 12


@pytest.mark.parametrize("limit", [{"bytes": 500}, {"tokens": 500}])
def test_a_single_text_is_cut_after_the_line_that_reaches_the_limit(tmp_path, limit):
    (tmp_path / "a.txt").write_text("".join(f"line number {i:04}\n" for i in range(10_000)))
    dataset = prepare(config_of(tmp_path, {"paths": [str(tmp_path / "a.txt")], "limit": limit}), quiet=True)
    (train,), (val,) = texts(dataset, "train"), texts(dataset, "val")
    assert train + val == "".join(f"line number {i:04}\n" for i in range(30))
    assert 0 < len(val) <= 0.2 * 510


def test_a_limit_stops_the_reading_of_a_data_set(tmp_path, monkeypatch):
    """Tokens are counted while merges are learned as well, before there is a tokenizer."""
    rows: list[int] = []

    def generate():
        for i in range(100_000):
            rows.append(i)
            yield {"text": f"document number {i} of a data set that is far too large"}

    stream = datasets.IterableDataset.from_generator(generate)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: stream)
    for limit in ({"documents": 300}, {"bytes": 16_000}, {"tokens": 5000}):
        source = {"type": "huggingface", "name": "far/away", "streaming": True, "limit": limit, "val_split": None}
        config = config_of(tmp_path, source, tokenizer={"type": "bpe", "vocab_size": 400})
        dataset = prepare(config, quiet=True)
        assert max(rows) < 1024, limit
        assert 290 < dataset.train.n_documents + dataset.val.n_documents < 900
    assert 5000 <= dataset.train.n_tokens + dataset.val.n_tokens < 5000 + 60


def test_a_limit_that_is_reached_fetches_not_another_row(tmp_path):
    jsonl(tmp_path / "a.jsonl", "a", "b", "c")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("not JSON\n")
    val = {"paths": [str(jsonl(tmp_path / "val.jsonl", "v"))]}
    source = {"paths": [str(tmp_path / "a.jsonl")], "limit": {"documents": 3}}
    assert prepare(config_of(tmp_path, source, val_sources=[val]), quiet=True).train.n_documents == 3


def test_a_limit_names_exactly_one_unit():
    with pytest.raises(ValidationError, match="bytes: missing, and it has no default; set it, or documents or tokens"):
        LimitConfig()
    with pytest.raises(ValidationError, match="tokens: bytes is also set; set one of bytes, documents, tokens"):
        LimitConfig(bytes=1, tokens=1)
    assert not Budget(None, None).is_spent


# --- cache keys ------------------------------------------------------------------------------------


def test_options_change_the_cache_key_and_their_defaults_do_not(tmp_path):
    """The first keys are those of the version before these options."""
    (tmp_path / "a.txt").write_text("text")
    files = {"paths": [str(tmp_path / "a.txt")]}
    hub = {"type": "huggingface", "name": "someone/something"}
    expected = {"files": "d5d357d8a969ca2a-documents", "hub": "b6737ff3a58b5122"}
    for name, source in {"files": files, "hub": hub}.items():
        key = key_of(config_of(tmp_path, source), tmp_path)
        assert key == expected[name]
        changed = [{"limit": {"documents": 5}}, {"limit": {"documents": 6}}, {"limit": {"bytes": 5}}]
        changed += [{"encoding": "cp1252"}, {"encoding": "skip"}, {"split_on": "x"}] if source is files else []
        keys = [key_of(config_of(tmp_path, source | change), tmp_path) for change in changed]
        assert len({key, *keys}) == len(keys) + 1
    same = [{"encoding": "UTF8"}, {"limit": None, "split_on": None}]
    assert {key_of(config_of(tmp_path, files | each), tmp_path) for each in same} == {expected["files"]}
    assert HuggingFaceSource(name="x").limit is None
