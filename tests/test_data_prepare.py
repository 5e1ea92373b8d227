"""Prepared data: built once and atomically, rebuilt after changes; and the command."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from filelock import FileLock
from pyarrow import parquet
from pydantic import ValidationError
from tokenizers import normalizers

from training import files
from training import prepare as command
from training.config import DataConfig
from training.data import Samples, Tokenizer, build, prepare, progress, shards
from training.data import dataset as dataset_module
from training.data.corpus import Corpus
from training.data.sources import build_readers
from training.data.stream_writer import StreamWriter
from training.data.tokenizer import build_byte_tokenizer, train_bpe
from training.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 200 rows of text in one file."""
    write_rows(tmp_path / "text" / "rows.jsonl", 200)
    return tmp_path


def write_rows(path: Path, n: int, word: str = "row") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text_of(i, word)}) + "\n" for i in range(n)))


def text_of(i: int, word: str = "row") -> str:
    return f"{word} number {i}: <|endoftext|> " + "naïve " * (i % 7)


def config_of(folder: Path, **options: object) -> DataConfig:
    default = {
        "sources": [{"paths": [str(folder / "text")]}],
        "val_fraction": 0.1,
        "tokenizer": {"type": "bpe", "vocab_size": 300},
        "cache_dir": str(folder / "cache"),
        "workers": 1,
    }
    return DataConfig.model_validate(default | options)


def datasets_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def texts(dataset, split: str) -> list[str]:
    """Return the documents, read back from disk by their boundaries."""
    return [text for stream in getattr(dataset, split).streams for text in texts_of(stream, dataset.tokenizer)]


def texts_of(stream: shards.Stream, tokenizer: Tokenizer) -> list[str]:
    assert (stream.tokens[stream.documents] == tokenizer.end_of_text).all()
    return [tokenizer.decode(ids[1:]) for ids in np.split(stream.tokens, stream.documents[1:].astype(int))]


# --- files on disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers", [1, 2])
def test_every_document_is_in_one_split_unchanged(folder, n_workers, monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARS", 1000)
    dataset = prepare(config_of(folder, workers=n_workers), quiet=True)
    train, val = texts(dataset, "train"), texts(dataset, "val")
    assert sorted(train + val) == sorted(text_of(i) for i in range(200))
    assert 5 < len(val) < 40
    for split, documents in ((dataset.train, train), (dataset.val, val)):
        assert split.n_documents == len(documents)
        assert split.n_bytes == sum(len(text.encode()) for text in documents)
        assert split.n_tokens == len(split.streams[0].tokens)
        tokens = split.streams[0].tokens
        assert dataset.tokenizer.token_bytes[tokens].sum() == split.n_bytes
        assert (tokens == dataset.tokenizer.end_of_text).sum() == split.n_documents


def test_the_number_of_workers_changes_nothing(folder, monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARS", 500)
    fingerprints = {
        prepare(config_of(folder, workers=n, cache_dir=str(folder / f"cache{n}")), quiet=True).fingerprint
        for n in (1, 2, 3)
    }
    assert len(fingerprints) == 1


def test_the_merges_are_learned_from_training_text_only(folder):
    write_rows(folder / "val.jsonl", 50, word="zyzzyva")
    val_sources = [{"paths": [str(folder / "val.jsonl")]}]
    dataset = prepare(config_of(folder, val_sources=val_sources), quiet=True)
    same = prepare(config_of(folder, val_sources=[{"paths": [str(folder / "text")]}]), quiet=True)
    assert dataset.tokenizer.inner.to_str() == same.tokenizer.inner.to_str()
    assert texts(dataset, "train") == [text_of(i) for i in range(200)]
    assert texts(dataset, "val") == [text_of(i, "zyzzyva") for i in range(50)]


def test_a_document_stays_in_its_split_when_others_are_added(folder):
    before = set(texts(prepare(config_of(folder), quiet=True), "val"))
    write_rows(folder / "text" / "again.jsonl", 200)
    write_rows(folder / "text" / "added.jsonl", 100, word="added")
    after = prepare(config_of(folder), quiet=True)
    assert {text for text in texts(after, "val") if text.startswith("row")} == before
    assert not before & set(texts(after, "train"))


def test_a_long_document_has_the_tokens_of_its_whole_text(folder, monkeypatch):
    monkeypatch.setattr("training.data.chunks.CHUNK_CHARS", 200)
    monkeypatch.setattr("training.data.chunks.MAX_SEARCH_CHARS", 200)
    long = Path(dataset_module.__file__).read_text()
    (folder / "text" / "long.txt").write_text(long)
    dataset = prepare(config_of(folder, val_sources=[{"paths": [str(folder / "text" / "rows.jsonl")]}]), quiet=True)
    stream = dataset.train.streams[0]
    assert stream.tokens[1 : stream.documents[1]].tolist() == dataset.tokenizer.encode(long).tolist()
    assert dataset.train.n_documents == 201


def test_weighted_sources_are_streams_of_their_own(folder):
    write_rows(folder / "other.jsonl", 300, word="other")
    paths = (folder / "text", folder / "other.jsonl")
    sources = [{"paths": [str(path)], "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)]
    dataset = prepare(config_of(folder, sources=sources), quiet=True)
    assert dataset.train.weights == (3, 1)
    assert [stream.name for stream in dataset.val.streams] == ["text", "other.jsonl"]
    tokens, _ = Samples(dataset.train, n_positions=32, seed=0).at(range(1024))
    other = ["other" in dataset.tokenizer.decode(row) for row in tokens]
    assert sum(other) == 256
    sources[0]["weight"] = 1
    again = prepare(config_of(folder, sources=sources), quiet=True)
    assert again.report["is_cached"]
    assert again.fingerprint == dataset.fingerprint


def test_blank_documents_are_left_out_and_counted(folder):
    (folder / "text" / "blank.jsonl").write_text('{"text": " \\n"}\n{"text": ""}\n{"text": "some"}\n')
    (folder / "text" / "empty.txt").touch()
    dataset = prepare(config_of(folder), quiet=True)
    assert "empty documents, left out: 3" in dataset.report["notes"]
    assert dataset.train.n_documents + dataset.val.n_documents == 201


# --- the cache -------------------------------------------------------------------------------------


def test_a_second_start_uses_the_cache(folder):
    first = prepare(config_of(folder), quiet=True)
    second = prepare(config_of(folder, workers=2), quiet=True)
    assert [first.report["is_cached"], second.report["is_cached"]] == [False, True]
    assert first.fingerprint == second.fingerprint
    assert second.report["seconds"] < 0.2
    assert second.tokenizer.encode("row number").tolist() == first.tokenizer.encode("row number").tolist()


def test_a_touched_or_renamed_file_does_not_rebuild_the_cache(folder):
    prepare(config_of(folder), quiet=True)
    path = folder / "text" / "rows.jsonl"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert prepare(config_of(folder), quiet=True).report["is_cached"]
    path.with_name("moved.jsonl").write_bytes(content)
    path.unlink()
    assert prepare(config_of(folder), quiet=True).report["is_cached"]


@pytest.mark.parametrize("change", ["text", "added", "tokenizer", "split"])
def test_changes_of_text_tokenizer_and_split_rebuild_the_cache(folder, change):
    first = prepare(config_of(folder), quiet=True)
    options = {}
    path = folder / "text" / "rows.jsonl"
    if change == "text":
        path.write_text(path.read_text().replace("number 3:", "number 4:"))
    elif change == "added":
        (folder / "text" / "b.txt").write_text("more")
    else:
        options = {"tokenizer": {"tokenizer": {"type": "byte"}}, "split": {"val_fraction": 0.2}}[change]
    second = prepare(config_of(folder, **options), quiet=True)
    assert not second.report["is_cached"]
    assert second.fingerprint != first.fingerprint


def test_text_that_changes_while_it_is_read_is_an_error(folder, monkeypatch):
    path = folder / "text" / "rows.jsonl"
    write = dataset_module.write_dataset

    def write_and_change(*arguments: object) -> None:
        write(*arguments)
        path.write_text(path.read_text() + '{"text": "late"}\n')

    monkeypatch.setattr(dataset_module, "write_dataset", write_and_change)
    with pytest.raises(UserError, match="changed while they were read"):
        prepare(config_of(folder), quiet=True)
    assert datasets_in(folder / "cache") == []


# --- interrupted, and several at once --------------------------------------------------------------

RUNNER = """
    import os, signal, sys
    from training.config import DataConfig
    from training.data import prepare

    config = DataConfig.model_validate_json(sys.argv[1])

    def child(kill_at=None):
        '''Prepare in a process of its own, which kills itself at its k-th operation on the cache.'''
        if pid := os.fork():
            return pid
        count = 0

        def watch(event, arguments):
            nonlocal count
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and "cache" in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        status = 1
        try:
            dataset = prepare(config, quiet=True)
            os.write(1, (dataset.fingerprint + "\\n").encode())
            status = 0
        finally:
            os._exit(status)
"""


def run(folder: Path, program: str, **options: object) -> list[str]:
    """Run a program after RUNNER. Returns the lines that it and its children print."""
    source = textwrap.dedent(RUNNER) + textwrap.dedent(program)
    argument = config_of(folder, **options).model_dump_json()
    result = subprocess.run(
        [sys.executable, "-c", source, argument], text=True, capture_output=True, check=True, cwd=ROOT, timeout=100
    )
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.skipif(not hasattr(sys, "addaudithook") or sys.platform == "win32", reason="needs fork")
def test_a_kill_at_any_operation_leaves_no_incomplete_dataset(folder):
    program = """
        k, killed = 0, True
        while killed:
            k += 1
            _, status = os.waitpid(child(kill_at=k), 0)
            killed = os.WIFSIGNALED(status)
            assert os.waitpid(child(), 0)[1] == 0
            leftovers = [name for name in os.listdir(config.cache_dir) if "." not in name or "partial" in name]
            assert len(leftovers) == 1 and "partial" not in leftovers[0], leftovers
            os.system(f"rm -r {config.cache_dir}")
        print(k)
    """
    *fingerprints, n_points = run(folder, program)
    assert int(n_points) > 20
    assert set(fingerprints) == {prepare(config_of(folder), quiet=True).fingerprint}


def test_processes_that_prepare_at_once_build_one_dataset(folder):
    program = """
        children = [child() for _ in range(8)]
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    """
    fingerprints = run(folder, program)
    assert len(fingerprints) == 8
    assert len(set(fingerprints)) == 1
    assert len(datasets_in(folder / "cache")) == 1


def test_files_of_another_killed_build_are_removed(folder):
    partial = folder / "cache" / "0123456789abcdef.partial"
    partial.mkdir(parents=True)
    (partial / "train-0.tokens").write_text("half")
    prepare(config_of(folder), quiet=True)
    assert len(datasets_in(folder / "cache")) == 1
    assert not partial.exists()


def test_files_of_an_earlier_killed_build_of_the_same_data_are_removed(folder):
    place = Path(prepare(config_of(folder), quiet=True).report["folder"])
    place.rename(place.with_suffix(".partial"))
    (place.with_suffix(".partial") / "stale").touch()
    assert not prepare(config_of(folder), quiet=True).report["is_cached"]
    assert not (place / "stale").exists()


def test_a_dataset_that_another_process_finishes_while_leftovers_are_removed_is_left_alone(folder):
    """Another process renames its `.partial` just before its lock is tried, after the folder was listed."""
    program = """
        other = os.path.join(config.cache_dir, "0123456789abcdef")
        os.makedirs(other + ".partial")

        def finish(event, arguments):
            if event == "open" and arguments[0] == other + ".lock" and os.path.exists(other + ".partial"):
                os.rename(other + ".partial", other)

        sys.addaudithook(finish)
        print(prepare(config, quiet=True).report["is_cached"], *sorted(os.listdir(other + "/..")))
    """
    is_cached, *names = run(folder, program)
    assert is_cached == "False"
    assert "0123456789abcdef" in names and not [name for name in names if "partial" in name] and len(names) == 5


@pytest.mark.soak
def test_of_200_starts_of_eight_data_sets_at_once_none_fails(folder):
    program = """
        for _ in range(25):
            go, start = os.pipe()
            children = []
            for i in range(8):
                if not (pid := os.fork()):
                    os.close(start)
                    os.read(go, 1)  # returns when the parent closes the other end
                    status = 1
                    try:
                        prepare(config.model_copy(update={"val_fraction": 0.1 + i / 100}), quiet=True)
                        status = 0
                    finally:
                        os._exit(status)
                children.append(pid)
            os.close(start)
            os.close(go)
            print(*(os.waitpid(pid, 0)[1] for pid in children))
            os.system(f"rm -r {config.cache_dir}")
    """
    assert run(folder, program, tokenizer={"type": "byte"}) == ["0"] * 200


def test_a_dataset_that_another_process_is_building_is_left_alone(folder):
    being_built = folder / "cache" / "0123456789abcdef.partial"
    being_built.mkdir(parents=True)
    with FileLock(being_built.with_suffix(".lock")):
        prepare(config_of(folder), quiet=True)
    assert being_built.exists()


def test_a_dataset_is_flushed_to_disk_before_it_is_renamed(folder, monkeypatch):
    events = []
    sync, rename = files.fsync_path, Path.rename
    for module in (build, files):
        monkeypatch.setattr(module, "fsync_path", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("rename"), rename(path, to)))
    place = Path(prepare(config_of(folder), quiet=True).report["folder"])
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    partial = {f"{place.name}.partial", ".tokenizer.json.tmp", ".tokenizer_config.json.tmp"}
    assert set(before) == {path.name for path in place.rglob("*")} | partial
    assert after == ["cache"]


def test_an_error_in_a_thread_ends_the_build_and_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(build, "BATCH_CHARS", 500)
    encode = Tokenizer.encode_batch

    def fail_at_150(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        if any("number 150:" in text for text in texts):
            raise MemoryError
        return encode(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", fail_at_150)
    with pytest.raises(MemoryError):
        prepare(config_of(folder, workers=2), quiet=True)
    assert datasets_in(folder / "cache") == []


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1e-9}, r"no document was held out for validation of 200 documents.*name data.val_sources$"),
        ({"val_fraction": 1 - 1e-9}, r"^data.sources: no document is left to train on of 200 documents"),
        ({"val_sources": [{"type": "stdlib", "weight": 1}]}, r"^data.val_sources: .*leave weight out$"),
    ],
)
def test_a_split_without_documents_is_an_error_that_says_what_to_do(folder, options, message):
    with pytest.raises(UserError, match=message):
        prepare(config_of(folder, **options), quiet=True)


def test_sources_without_text_are_named(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").touch()
    empty = [{"paths": [str(folder / "empty")]}]
    with pytest.raises(UserError, match=r"a.txt: no text in this file"):
        prepare(config_of(folder, sources=empty), quiet=True)
    with pytest.raises(UserError, match=r"^data.val_sources: no text"):
        prepare(config_of(folder, val_sources=empty), quiet=True)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-0.tokens", lambda path: path.write_bytes(path.read_bytes()[:-1]), r"bytes long, not \d+"),
        ("train-0.tokens", lambda path: path.write_bytes(b"text " * path.stat().st_size), r"bytes long, not \d+"),
        ("train-0.tokens", lambda path: path.write_bytes(b"t" * path.stat().st_size), "SHA-256 is not the one"),
        ("train-0.tokens", lambda path: flip_a_bit(path), "SHA-256 is not the one"),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace("<u2", "<u4")), "bytes long, not"),
        ("val-0.documents", lambda path: path.write_bytes(b""), r"0 bytes long, not \d+"),
        ("val-0.tokens", Path.unlink, "No such file"),
        ("manifest.json", Path.unlink, "No such file"),
        ("manifest.json", lambda path: path.write_text("{"), "EOF"),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace("<u2", "<f2")), "Input should be"),
        ("tokenizer/tokenizer.json", lambda path: path.write_text(path.read_text() + " "), "not the file that was"),
        ("tokenizer/tokenizer.json", Path.unlink, "No such file"),
    ],
)
def test_a_damaged_cache_is_an_error_that_says_what_to_delete(folder, name, damage, message):
    place = Path(prepare(config_of(folder), quiet=True).report["folder"])
    damage(place / name)
    with pytest.raises(UserError, match=message) as error:
        prepare(config_of(folder), quiet=True)
    line = str(error.value)
    assert line.startswith((f"{place / name}: damaged (", f"{place}/train-0.tokens: damaged ("))
    assert f"delete {place} and start again" in line
    assert "\n" not in line


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_token_beyond_the_vocabulary_in_a_file_too_long_to_hash_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(shards, "HASH_AT_START_BYTES", 0)
    dataset = prepare(config_of(folder), quiet=True)
    with (Path(dataset.report["folder"]) / "val-0.tokens").open("r+b") as file:  # the file that is mapped
        file.write(b"\xff" * 99)
    with pytest.raises(UserError, match=r"token 65535 is not below the vocabulary's 300"):
        Samples(dataset.val, n_positions=8, seed=None).at([0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_in_one_line(folder, monkeypatch):
    place = folder / "cache"
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(
            build, "StreamWriter", lambda tokenizer, **files: StreamWriter(tokenizer, **files | {"tokens": full})
        )
        with pytest.raises(UserError, match=rf"^{place}: cannot be written: No space left on device$"):
            prepare(config_of(folder), quiet=True)
    assert datasets_in(place) == []


def test_a_cache_that_cannot_be_created_is_reported_in_one_line(folder):
    with pytest.raises(UserError, match=r"rows.jsonl.*: cannot be written: "):
        prepare(config_of(folder, cache_dir=str(folder / "text" / "rows.jsonl" / "cache")), quiet=True)


# --- progress and Ctrl-C ---------------------------------------------------------------------------


def test_a_long_stage_prints_a_line_at_times_and_knows_its_total(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    with progress.show_progress("reading", False, total=4_000_000) as stage:
        *_, last = stage.watch(["a" * 1_000_000, "b" * 1_000_000], "learning")
        time.sleep(0.1)
    first, *lines, end = capsys.readouterr().err.splitlines()
    assert (last, first) == ("b" * 1_000_000, "reading ...")
    assert lines and lines[-1].startswith("learning: 2.0 MB in ") and end.startswith("reading: 2.0 MB in ")
    assert str(progress.Progress("reading", 4_000_000)).startswith("reading: 0.0 of 4.0 MB in ")
    monkeypatch.setattr(progress, "LINE_EVERY_S", 30)
    with progress.show_progress("hashing", False, only_if_slow=True):
        pass
    assert capsys.readouterr().err == ""


def test_progress_tells_share_speed_and_time_left_of_compressed_text_as_well():
    stage = progress.Progress("reading", total_read=1000)
    assert "MB/s" not in str(stage)
    stage.add_read(250)
    stage.add(5_000_000)
    stage.start -= 10
    assert str(stage).startswith("reading: 5.0 MB in 10.0 s, 25%, 0.5 MB/s, 0:00:30 left")
    unknown = progress.Progress("reading", at_most=10_000_000)
    unknown.add(5_000_000)
    unknown.start -= 10
    assert str(unknown).startswith("reading: 5.0 MB in 10.0 s, 0.5 MB/s") and "left" not in str(unknown)
    early = progress.Progress("reading", total_read=1000, at_most=10_000_000)
    early.add(5_000_000)
    early.add_read(1)
    assert ", 50%, " in str(early)


@pytest.mark.parametrize("is_single", [True, False])
def test_the_bytes_that_are_read_of_files_add_up_to_their_sizes(tmp_path, is_single):
    (tmp_path / "text").mkdir()
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5000)).encode()
    (tmp_path / "text" / "a.txt.gz").write_bytes(gzip.compress(rows))
    if not is_single:
        (tmp_path / "text" / "b.jsonl").write_bytes(rows)
        (tmp_path / "text" / "c.jsonl.gz").write_bytes(gzip.compress(rows))
        (tmp_path / "text" / "d.csv").write_text("text\n" + "row\n" * 5000)
        parquet.write_table(pyarrow.table({"text": ["row"] * 5000}), tmp_path / "text" / "e.parquet")
    corpus, sizes = Corpus(config_of(tmp_path)), []
    corpus.count_reads(sizes.append)
    for chunks in corpus.chunks():
        assert list(chunks)
    n_stored = sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    assert corpus.bytes_to_read == n_stored * (2 if is_single else 1)
    assert corpus.bytes_to_read - 100 < sum(sizes) <= corpus.bytes_to_read  # rows of parquet are rounded


def test_the_bytes_of_plain_text_are_known_before_it_is_read(folder):
    (folder / "text" / "rows.jsonl").rename(folder / "rows.jsonl")
    (folder / "text" / "a.txt").write_text("naïve " * 100)
    (folder / "text" / "b.py").write_text("pass")
    assert Corpus(config_of(folder)).n_bytes == 704
    corpus = Corpus(config_of(folder, tokenizer={"type": "bpe", "max_bytes": 500}))
    assert build.sizes_to_learn_from(corpus)["total"] == 500
    assert Corpus(config_of(folder, val_sources=[{"paths": [str(folder / "rows.jsonl")]}])).n_bytes is None


def test_ctrl_c_ends_the_training_of_a_tokenizer_at_once():
    """The library's native code would hold the interrupt back until the text ends, which here takes half a minute."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_bpe(itertools.repeat("some words of a text " * 20, 10**5), 300)
    assert time.monotonic() - start < 5


# --- the command -----------------------------------------------------------------------------------


def write_config(folder: Path, source: str) -> str:
    path = folder / "run.yaml"
    path.write_text(
        f"data:\n  sources: [{{type: files, paths: ['{source}']}}]\n  val_fraction: 0.1\n"
        f"  cache_dir: {folder / 'cache'}\n  tokenizer: {{type: byte}}\n"
    )
    return str(path)


def test_the_command_prints_counts_and_whether_the_cache_was_used(folder, capsys):
    for is_cached in (False, True):
        assert command.main(["--config", write_config(folder, str(folder / "text"))]) == 0
        out = capsys.readouterr().out
        assert "train " in out
        assert "documents" in out
        assert "bytes/token" in out
        assert ("found in the cache" in out) == is_cached
        assert ("MB/s" in out) != is_cached


def test_the_command_ends_with_status_2_for_bad_text(folder, capsys):
    (folder / "bad.txt").write_bytes(b"\xff")
    assert command.main(["--config", write_config(folder, str(folder / "bad.txt"))]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {folder / 'bad.txt'}: byte 0 is not UTF-8 text (invalid start byte); set encoding")


def test_preparing_imports_no_torch(folder):
    program = (
        "import sys; from training.prepare import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules); sys.exit(status)"
    )
    arguments = ["--config", write_config(folder, str(folder / "text"))]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments], text=True, capture_output=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 3 and lines[0] == "tokenizing ..."  # the byte tokenizer is not learned
    assert lines[1].startswith("tokenizing: 0.0 MB in ")
    assert lines[2].startswith("data: <|endoftext|> in the text: 200, as ordinary characters; ")


# --- a single text, and files without a cache --------------------------------------------------------


@pytest.mark.parametrize("chunk", [1 << 20, 97], ids=["one chunk", "many chunks"])
def test_the_end_of_a_single_text_file_is_held_out_from_a_line_start(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("training.data.chunks.CHUNK_CHARS", chunk)
    monkeypatch.setattr("training.data.chunks.MAX_SEARCH_CHARS", 20)
    lines = [f"line {i} of a text\n" for i in range(1000)]
    (tmp_path / "text.txt").write_text("".join(lines))
    dataset = prepare(config_of(tmp_path, sources=[{"paths": [str(tmp_path / "text.txt")]}]))
    (train,), (val,) = texts(dataset, "train"), texts(dataset, "val")
    assert train + val == "".join(lines)
    assert val.startswith("line 9") and val.count("\n") == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("text", "n_val"),
    [
        ("acgt" * 250 + "\n", 101),
        (">one line\n" + "acgt" * 250 + "\n", 102),
        ("acgt" * 250 + "\nend\n", 101),
        ("word " * 200 + "\n" * 300, 401),
        ("\n" * 9000 + "acgt" * 250, 100),
    ],
    ids=["a line", "a header and a line", "a short last line", "white space at the end", "white space at the start"],
)
def test_the_end_of_a_single_text_of_one_line_is_held_out(tmp_path, text, n_val):
    (tmp_path / "text.txt").write_text(text)
    sources = [{"paths": [str(tmp_path / "text.txt")]}]
    dataset = prepare(config_of(tmp_path, sources=sources, tokenizer={"type": "byte"}), quiet=True)
    (train,), (val,) = texts(dataset, "train"), texts(dataset, "val")
    assert train + val == text
    assert len(val) == n_val and train.strip() and val.strip()


def test_text_after_a_chunk_of_white_space_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.chunks.CHUNK_CHARS", 50)
    monkeypatch.setattr("training.data.chunks.MAX_SEARCH_CHARS", 20)
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text("\n" * 200 + f"text {i}")
    sources = {"val_sources": [{"paths": [str(tmp_path / "text" / "0.txt")]}]}
    dataset = prepare(config_of(tmp_path, **sources), quiet=True)
    assert sorted(texts(dataset, "train")) == sorted("\n" * 200 + f"text {i}" for i in range(30))
    assert not any("empty documents" in note for note in dataset.report["notes"])


def test_the_advice_for_few_documents_helps(tmp_path):
    write_rows(tmp_path / "text" / "rows.jsonl", 2)
    with pytest.raises(UserError, match="no document was held out for validation of 2 documents") as error:
        prepare(config_of(tmp_path, val_fraction=1e-9), quiet=True)
    fraction = float(str(error.value).split("set data.val_fraction to ")[1].split(",")[0])
    dataset = prepare(config_of(tmp_path, val_fraction=fraction), quiet=True)
    assert (dataset.train.n_documents, dataset.val.n_documents) == (1, 1)
    write_rows(tmp_path / "text" / "rows.jsonl", 1)
    with pytest.raises(UserError, match=r"the only one as a .txt file, whose end is then held out"):
        prepare(config_of(tmp_path), quiet=True)


def test_a_single_text_without_lines_is_split_anyway(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 1000)
    dataset = prepare(config_of(tmp_path, sources=[{"paths": [str(tmp_path / "text.txt")]}]))
    assert (len(texts(dataset, "train")[0]), len(texts(dataset, "val")[0])) == (4500, 500)


def test_two_text_files_are_two_documents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"only {name} " * 100)
    with pytest.raises(UserError, match="no document was held out for validation of 2 documents"):
        prepare(config_of(tmp_path, sources=[{"paths": [str(tmp_path / "*.txt")]}], val_fraction=1e-9))


# --- separators in the text --------------------------------------------------------------------------

DUMP = ["first text\n", "\nsecond text\n", "a<b>c" * 9, "", "last"]


def dump_of(folder: Path, name: str, *documents: str) -> Path:
    path = folder / name
    path.write_text("<|endoftext|>".join(documents))
    return path


@pytest.mark.parametrize("chunk", [1 << 20, 16], ids=["one chunk", "many chunks"])
def test_separators_in_txt_files_are_document_borders(tmp_path, monkeypatch, capsys, chunk):
    """In small chunks, cuts go through separators."""
    monkeypatch.setattr("training.data.chunks.CHUNK_CHARS", chunk)
    monkeypatch.setattr("training.data.chunks.MAX_SEARCH_CHARS", 2)
    paths = [dump_of(tmp_path, "a.txt", *DUMP), dump_of(tmp_path, "b.txt", "other")]
    sources = [{"paths": [str(path)]} for path in paths]
    val_sources = [{"paths": [str(dump_of(tmp_path, "v.txt", "", "x", "y", ""))]}]
    options = {"sources": sources, "val_sources": val_sources, "tokenizer": {"type": "byte"}}
    for _ in range(2):  # built, and from the cache
        dataset = prepare(config_of(tmp_path, **options))
        assert "data: <|endoftext|> in .txt files: 7, each a border between documents\n" in capsys.readouterr().err
    assert texts(dataset, "train") == [*filter(None, DUMP), "other"]
    assert texts(dataset, "val") == ["x", "y"]
    assert "empty documents, left out: 3" in dataset.report["notes"]
    assert dataset.train.n_bytes == len("".join(DUMP) + "other")
    split = dataset_module.read_split([str(tmp_path / "[ab].txt")], dataset.tokenizer)
    assert np.array_equal(split.streams[0].tokens, dataset.train.streams[0].tokens)
    assert "data: <|endoftext|> in .txt files: 4, " in capsys.readouterr().err


def test_the_end_of_a_single_dump_is_held_out_from_a_document_or_line(tmp_path):
    documents = [f"document {i}\nwith two lines " for i in range(100)]
    path = dump_of(tmp_path, "dump.txt", *documents)
    options = {"sources": [{"paths": [str(path)]}], "tokenizer": {"type": "byte"}}
    dataset = prepare(config_of(tmp_path, **options), quiet=True)
    train, val = texts(dataset, "train"), texts(dataset, "val")
    assert train[:90] == documents[:90] and val[-9:] == documents[-9:]
    assert "".join(train + val) == "".join(documents)
    exact = ["x" * 90, "y\n" * 5]  # the border of a tenth is where the second begins
    dump_of(tmp_path, "dump.txt", *exact)
    dataset = prepare(config_of(tmp_path, **options), quiet=True)
    assert [texts(dataset, split) for split in ("train", "val")] == [exact[:1], exact[1:]]
    assert dataset.report["notes"] == ["<|endoftext|> in .txt files: 1, each a border between documents"]


def test_separators_elsewhere_are_ordinary_characters_and_counted(tmp_path):
    """No text of a record or of code becomes a special token."""
    text = "a<|endoftext|>b</s>"
    for name in ("a.py", "a.md"):
        (tmp_path / name).write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.txt").write_text("only </s>")
    sources = [{"paths": [str(tmp_path / name)]} for name in ("a.py", "a.md", "a.jsonl", "a.txt")]
    options = {"sources": sources, "val_sources": sources, "tokenizer": {"type": "byte"}}
    dataset = prepare(config_of(tmp_path, **options), quiet=True)
    assert texts(dataset, "train") == [text, text, text, "only </s>"]
    assert dataset.report["notes"][:2] == [
        "<|endoftext|> in the text: 6, as ordinary characters; it separates documents in .txt files only, "
        "or where split_on names it",
        "</s> in the text: 8, as ordinary characters; documents are separated by <|endoftext|>; or name it as split_on",
    ]


def test_a_cache_of_a_version_that_did_not_split_dumps_is_not_used(tmp_path):
    path = dump_of(tmp_path, "dump.txt", *[f"text {i}\n" for i in range(50)])
    options = {"sources": [{"paths": [str(path)]}], "tokenizer": {"type": "byte"}}
    dataset = prepare(config_of(tmp_path, **options), quiet=True)
    place = Path(dataset.report["folder"])
    assert json.loads((place / "manifest.json").read_text())["key"] == place.name.partition("-")[0] != place.name


# --- text that is there twice ------------------------------------------------------------------------


def test_validation_text_in_the_training_text_is_counted(folder, capsys):
    write_rows(folder / "val.jsonl", 3)
    write_rows(folder / "more.jsonl", 2, word="new")
    val_sources = [
        {"paths": [str(folder / "val.jsonl")], "name": "val"},
        {"paths": [str(folder / "more.jsonl")]},
    ]
    (folder / "text" / "copy.jsonl").write_bytes((folder / "val.jsonl").read_bytes())
    dataset = prepare(config_of(folder, val_sources=val_sources, tokenizer={"type": "byte"}))
    error = capsys.readouterr().err
    shared = "validation documents that are also training documents: 3 of 5 (3 of val in text)"
    assert f"data: {shared}; their loss is not" in error
    assert "data: training documents that repeat another word for word: 3\n" in error
    assert dataset.train.n_documents == 203  # nothing is left out


def test_shared_documents_are_counted_by_source(tmp_path):
    """A document that two training sources have counts in both pairs, and once in the sum."""
    for name, words in {"a": "xyz", "b": "zw", "v": "xzq", "w": "xx"}.items():
        lines = "".join(json.dumps({"text": f"text {word}"}) + "\n" for word in words)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    sources, val_sources = ([{"paths": [str(tmp_path / f"{n}.jsonl")], "name": n} for n in ns] for ns in ("ab", "vw"))
    options = {"sources": sources, "val_sources": val_sources, "tokenizer": {"type": "byte"}}
    dataset = prepare(config_of(tmp_path, **options), quiet=True)
    line = "validation documents that are also training documents: 4 of 5 (2 of v in a, 1 of v in b, 2 of w in a); "
    assert any(note.startswith(line) for note in dataset.report["notes"])


# --- validation text by source -----------------------------------------------------------------------


def names_and_texts(dataset) -> dict[str, list[str]]:
    """Return the validation documents by the name of their source."""
    return {stream.name: texts_of(stream, dataset.tokenizer) for stream in dataset.val.streams}


@pytest.mark.parametrize("weights", [(None, None), (1, 3)])
def test_held_out_documents_keep_the_name_of_their_source(tmp_path, weights):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", 100, word=name)
    sources = [
        {"paths": [str(tmp_path / f"{name}.jsonl")], "weight": weight} | chosen
        for (name, weight, chosen) in zip("ab", weights, ({"name": "first"}, {}), strict=True)
    ]
    options = {"sources": sources, "val_fraction": 0.2, "tokenizer": {"type": "byte"}}
    dataset = prepare(config_of(tmp_path, **options), quiet=True)
    by_name = names_and_texts(dataset)
    assert list(by_name) == ["first", "b.jsonl"]
    assert all(
        texts and all(word in text for text in texts) for word, texts in zip("ab", by_name.values(), strict=True)
    )
    assert sum(map(len, by_name.values())) == dataset.val.n_documents
    for stream in dataset.val.streams:
        assert (dataset.tokenizer.token_bytes[stream.tokens].sum(), len(stream.documents)) == (
            stream.n_bytes, len(by_name[stream.name]),
        )  # fmt: skip
    renamed = [sources[0], sources[1] | {"name": "second"}]
    again = prepare(config_of(tmp_path, **options | {"sources": renamed}), quiet=True)
    assert again.report["is_cached"] and again.fingerprint == dataset.fingerprint
    assert list(names_and_texts(again)) == ["first", "second"]


def test_sources_without_a_name_get_one_of_their_path(tmp_path):
    (tmp_path / "odd name!").mkdir()
    paths = ["odd name!/a.txt", "odd name!/*.txt", "b/a.txt", "c/a.txt", "*"]
    for path in ("odd name!/a.txt", "b/a.txt", "c/a.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("text " + path)
    sources = [{"paths": [str(tmp_path / path)]} for path in paths[:4]] + [{"type": "stdlib", "name": "a.txt-2"}]
    names = [reader.name for reader in build_readers(config_of(tmp_path, sources=sources).sources)]
    assert names == ["a.txt", "odd-name", "a.txt-3", "a.txt-4", "a.txt-2"]


def test_a_source_without_validation_text_and_a_cache_without_sources_are_said(tmp_path):
    write_rows(tmp_path / "a.jsonl", 100)
    write_rows(tmp_path / "b.jsonl", 1, word="one")
    sources = [{"paths": [str(tmp_path / f"{name}.jsonl")]} for name in "ab"]
    config = config_of(tmp_path, sources=sources, tokenizer={"type": "byte"})
    dataset = prepare(config, quiet=True)
    text = (
        "no validation text, and so no validation loss of its own: b.jsonl; a larger data.val_fraction holds some out"
    )
    assert dataset.report["notes"][0] == text
    path = Path(dataset.report["folder"], "manifest.json")
    manifest = json.loads(path.read_text())
    for record in manifest["streams"]:
        del record["parts"]
    path.write_text(json.dumps(manifest))
    older = prepare(config, quiet=True)
    note = older.report["notes"][0]
    assert note.startswith("prepared by an earlier version, which did not note the source of each validation document")
    assert older.fingerprint == dataset.fingerprint and list(names_and_texts(older)) == [""]


@pytest.mark.parametrize("harm", [{"source": 7}, {"n_tokens": 3}, {"n_documents": 0}])
def test_parts_that_do_not_fit_are_a_damaged_manifest(folder, harm):
    dataset = prepare(config_of(folder), quiet=True)
    path = Path(dataset.report["folder"], "manifest.json")
    manifest = json.loads(path.read_text())
    manifest["streams"][1]["parts"][0] |= harm
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(the parts of its val text do not fit the sources"):
        prepare(config_of(folder), quiet=True)


def test_no_source_has_the_name_of_the_averaged_weights(tmp_path):
    with pytest.raises(ValidationError, match="a source cannot have the name average"):
        config_of(tmp_path, sources=[{"type": "stdlib", "name": "average"}])
    (tmp_path / "average").mkdir()
    (tmp_path / "average" / "a.txt").write_text("text")
    (reader,) = build_readers(config_of(tmp_path, sources=[{"paths": [str(tmp_path / "average")]}]).sources)
    assert reader.name == "average-2"


def test_two_sources_of_one_name_are_refused(tmp_path):
    sources = [{"type": "stdlib", "name": "x"}, {"paths": ["a"], "name": "x"}]
    with pytest.raises(ValidationError, match="two sources have the name x"):
        config_of(tmp_path, sources=sources)


def test_a_file_by_several_spellings_is_read_once(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    file, other = Path("text/rows.jsonl"), {"paths": ["text/../text/*.jsonl"]}
    Path("link.jsonl").symlink_to(file)
    Path("hard.jsonl").hardlink_to(file)
    Path("linked").symlink_to("text")
    spellings = [str(file), f"./{file}", str(file.absolute()), "link.jsonl", "hard.jsonl", "linked"]
    once = prepare(config_of(folder), quiet=True)
    options = {"sources": [{"paths": spellings}, other], "tokenizer": {"type": "bpe", "vocab_size": 300}}
    dataset = prepare(config_of(folder, **options))
    assert dataset.report["is_cached"] and dataset.fingerprint == once.fingerprint
    line = f"data: paths to files that are listed before, left out: 5 (such as {file.absolute()}, {file}); "
    assert line in capsys.readouterr().err
    weighted = [source | {"weight": 1} for source in options["sources"]]
    repeated = prepare(config_of(folder, sources=weighted, tokenizer={"type": "byte"}))
    assert [len(stream.documents) for stream in repeated.train.streams] == [once.train.n_documents] * 2
    assert "training documents that repeat another" in capsys.readouterr().err


def test_the_fingerprint_is_that_of_the_tokens_wherever_they_are_from(folder):
    plain = prepare(config_of(folder), quiet=True)
    path = folder / "text" / "rows.jsonl"
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    packed = prepare(config_of(folder, sources=[{"paths": [str(folder / "packed.jsonl.gz")]}]), quiet=True)
    assert not packed.report["is_cached"]
    assert packed.fingerprint == plain.fingerprint != plain.old_fingerprint != packed.old_fingerprint


def test_bits_per_byte_count_the_texts_own_bytes_under_normalization(tmp_path, capsys):
    inner = build_byte_tokenizer().inner
    inner.normalizer = normalizers.NFC()
    inner.save(str(tmp_path / "nfc.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "e\u0301" * 10}))  # 30 bytes, composed 20
    sources = [{"paths": [str(tmp_path / "a.jsonl")]}]
    tokenizer = {"type": "file", "path": str(tmp_path / "nfc.json")}
    dataset = prepare(config_of(tmp_path, sources=sources, val_sources=sources, tokenizer=tokenizer))
    assert (dataset.val.n_bytes, dataset.val.streams[0].token_bytes) == (30, 20)
    line = "data: the tokenizer's NFC makes 40 bytes of the text's 60; bits per byte count the text's own\n"
    assert line in capsys.readouterr().err
    split = dataset_module.read_split([str(tmp_path / "a.jsonl")], dataset.tokenizer)
    assert (split.n_bytes, split.streams[0].token_bytes) == (30, 20)


def test_files_read_into_memory_equal_their_prepared_split(folder):
    sources = [{"paths": [str(folder / "text")]}]
    dataset = prepare(config_of(folder, val_sources=sources))
    split = dataset_module.read_split([str(folder / "text")], dataset.tokenizer)
    (ours,), (theirs,) = split.streams, dataset.val.streams
    assert np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.documents, theirs.documents)
    counts = ("n_documents", "n_tokens", "n_bytes", "vocab_size")
    assert all(getattr(split, name) == getattr(dataset.val, name) for name in counts)
    with pytest.raises(UserError, match=r"no\.jsonl"):
        dataset_module.read_split([str(folder / "no.jsonl")], dataset.tokenizer)
