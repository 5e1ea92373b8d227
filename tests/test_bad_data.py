"""Bad text and damaged shards: the commands print one line with the file and the record, and exit with status 2.

No dataset and no run folder is left behind.
"""

import gzip
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import rows, tensors, write_config
from warm import Launch

from training import prepare as prepare_command
from training.checkpoint import corruption
from training.config import DataConfig
from training.data import prepare, shards
from training.data.row_files import FileOptions
from training.data.text_files import read_documents
from training.train import main as train_command

WORDS = "".join(f"line {i} of a text that is long enough to be cut in two\n" for i in range(400))
LONG = 50_000_000  # bytes of a line


def jsonl(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def data_of(folder: Path, *names: str) -> dict:
    paths = [str(folder / name) for name in names]
    cache = str(folder / "cache")
    return {"sources": [{"paths": paths}], "tokenizer": {"type": "byte"}, "cache_dir": cache, "workers": 1}


def error_of(main: Callable, path: Path, capsys) -> str:
    """Run a command that exits with status 2. Returns its only error line."""
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.endswith(f"{lines[0]}\n") and "Traceback" not in error, error
    return lines[0]


# --- text ------------------------------------------------------------------------------------------

ROW = {"text": "a row of text"}
TEXT = {
    "empty": ("a.txt", b"", "a.txt: no text in this file"),
    "only newlines": ("a.txt", b"\n" * 999, "a.txt: no text in this file"),
    "only blank rows": ("a.jsonl", b"\n\r\n \n", "a.jsonl: no text in this file"),
    "one byte": ("a.txt", b"a", "no document is left to train on of 1 documents"),
    "one byte of UTF-16": ("a.txt", b"\xff", "a.txt: byte 0 is not UTF-8 text"),
    "not UTF-8": ("a.txt", WORDS.encode() + b"\xc3(", f"a.txt: byte {len(WORDS)} is not UTF-8 text"),
    "not UTF-8 in a row": ("a.jsonl", jsonl(ROW) + b'{"text": "\xff"}\n', "a.jsonl: line 2: byte 10"),
    "NUL": ("a.txt", WORDS.encode() + b"\0", f"a.txt: byte {len(WORDS)} is NUL"),
    "NUL in a row": ("a.jsonl", jsonl(ROW, ROW) + b'{"text": "\0"}\n', "a.jsonl: line 3: not JSON"),
    "a long line, torn": ("a.jsonl", jsonl(ROW) + b'{"text": "' + b"x" * LONG, "a.jsonl: line 2: not JSON"),
    "a missing column": ("a.jsonl", jsonl(ROW, {"body": "a"}), "a.jsonl: line 2: no column 'text'; there are body"),
    "no object": ("a.jsonl", jsonl(ROW, ["a"]), "a.jsonl: line 2: a JSON list, not an object"),
    "no text": ("a.jsonl", jsonl(ROW, {"text": 3}), "a.jsonl: line 2: 'text' is int, not text"),
    "a torn last line": ("a.jsonl", jsonl(ROW, ROW)[:-4], "it is the last line: was it cut short?"),
    "gzip cut short": ("a.txt.gz", gzip.compress(WORDS.encode())[:-20], "a.txt.gz: cut short"),
    "gzip with a flipped bit": ("a.txt.gz", gzip.compress(WORDS.encode())[:-6] + b"oh no!", "a.txt.gz: cannot be read"),
    "not gzip": ("a.jsonl.gz", jsonl(ROW), "a.jsonl.gz: cannot be read: damaged, or not a .gz file"),
    "nothing held out": ("a.jsonl", jsonl(ROW), "no document was held out for validation of 1 documents"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXT)
def test_unreadable_text_is_one_line_that_names_it(options, tmp_path, capsys, case):
    name, content, message = TEXT[case]
    (tmp_path / name).write_bytes(content)
    path = write_config(tmp_path / "run.yaml", options(data=data_of(tmp_path, name)))
    for main in (prepare_command.main, train_command):
        line = error_of(main, path, capsys)
        assert message in line and (str(tmp_path / name) in line or "data.val_fraction" in line), line
        assert len(line) < 400
    assert [each for each in (tmp_path / "cache").iterdir() if each.is_dir()] == []
    assert not (tmp_path / "runs/small").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "no usable file in this folder"),
        (lambda path: (path.mkdir(), (path / "b.txt").mkdir()), "no usable file in this folder"),
        (lambda path: (path.mkdir(), os.mkfifo(path / "b.txt")), "b.txt: not a file but a folder, a pipe or a device"),
        (lambda path: (path.mkdir(), (path / "b.txt").symlink_to(path / "gone")), "b.txt: cannot be read: No such"),
        (lambda _: None, "a.txt: no such file or folder"),
    ],
    ids=["a folder", "a folder of folders", "a pipe", "a link to nothing", "nothing"],
)
def test_a_path_that_is_not_a_file_is_one_line(options, tmp_path, capsys, make, message):
    make(tmp_path / "a.txt")
    path = write_config(tmp_path / "run.yaml", options(data=data_of(tmp_path, "a.txt")))
    line = error_of(prepare_command.main, path, capsys)
    assert line.startswith(f"error: {tmp_path}/a.txt") and message in line


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable to root")
def test_a_file_without_read_permission_is_one_line(options, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "a.txt").chmod(0)
    path = write_config(tmp_path / "run.yaml", options(data=data_of(tmp_path, "a.txt")))
    assert "a.txt: cannot be read: Permission denied" in error_of(prepare_command.main, path, capsys)


def tokens_of(folder: Path, name: str, content: bytes) -> np.ndarray:
    folder.mkdir()
    (folder / name).write_bytes(content)
    dataset = prepare(DataConfig.model_validate(data_of(folder, name)), quiet=True)
    return np.concatenate([split.streams[0].tokens for split in (dataset.train, dataset.val)])


def test_unusual_but_valid_text_is_read_unchanged(tmp_path):
    """A byte order mark is dropped; line ends and lines of any length are kept."""
    plain = tokens_of(tmp_path / "plain", "a.txt", WORDS.encode())
    assert tokens_of(tmp_path / "mark", "a.txt", b"\xef\xbb\xbf" + WORDS.encode()).tolist() == plain.tolist()
    windows = tokens_of(tmp_path / "windows", "a.txt", WORDS.replace("\n", "\r\n").encode())
    assert windows[windows != ord("\r")].tolist() == plain.tolist() and (windows == ord("\r")).sum() == 400
    line = WORDS.replace("\n", " ").encode()
    long = tokens_of(tmp_path / "long", "a.txt", line * (3_000_000 // len(line)))
    assert (long != 256).sum() == 3_000_000 // len(line) * len(line)


def test_a_row_of_50_mb_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "x" * LONG}))
    (document,) = read_documents(tmp_path / "a.jsonl", FileOptions("text"))
    assert sum(map(len, document.chunks)) == LONG


# --- shards ----------------------------------------------------------------------------------------


def replace_tokens(folder: Path, tokens: np.ndarray) -> None:
    """Replace the training tokens and adapt the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    record = next(each for each in manifest["streams"] if each["split"] == "train")
    record |= {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest(), "n_tokens": len(tokens)}
    record["parts"][0]["n_tokens"] = len(tokens)
    (folder / TRAIN).write_bytes(tokens.tobytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def replace_file(path: Path, create: Callable[[Path], object]) -> None:
    path.unlink()
    create(path)


def same_size(path: Path) -> bytes:
    return (WORDS * 99).encode()[: path.stat().st_size]


TRAIN = "train-0.tokens"
SHARDS = {
    "odd byte count": (TRAIN, lambda place: os.truncate(place / TRAIN, (place / TRAIN).stat().st_size - 1)),
    "cut by a token": (TRAIN, lambda place: os.truncate(place / TRAIN, (place / TRAIN).stat().st_size - 2)),
    "empty": (TRAIN, lambda place: (place / TRAIN).write_bytes(b"")),
    "text": (TRAIN, lambda place: (place / TRAIN).write_text(WORDS)),
    "text of the same size": (TRAIN, lambda place: (place / TRAIN).write_bytes(same_size(place / TRAIN))),
    "a flipped bit": (TRAIN, lambda place: flip_a_bit(place / TRAIN)),
    "the other split's": (TRAIN, lambda place: shutil.copy(place / "val-0.tokens", place / TRAIN)),
    "another type": (TRAIN, lambda place: edit_manifest(place, "<u2", "<u4")),
    "no type": ("manifest.json", lambda place: edit_manifest(place, "<u2", "<i2")),
    "a token beyond the vocabulary": (TRAIN, lambda place: replace_tokens(place, np.full(900, 257, "<u2"))),
    "a negative token": (TRAIN, lambda place: replace_tokens(place, np.full(900, -1, "<i2"))),
    "a folder": (TRAIN, lambda place: replace_file(place / TRAIN, Path.mkdir)),
    "gone": (TRAIN, lambda place: (place / TRAIN).unlink()),
    "a manifest that is a folder": ("manifest.json", lambda p: replace_file(p / "manifest.json", Path.mkdir)),
    "a manifest that is torn": ("manifest.json", lambda place: os.truncate(place / "manifest.json", 100)),
    "a tokenizer that is a folder": (
        "tokenizer/tokenizer.json", lambda p: replace_file(p / "tokenizer/tokenizer.json", Path.mkdir)
    ),
}  # fmt: skip


def edit_manifest(folder: Path, old: str, new: str) -> None:
    text = (folder / "manifest.json").read_text()
    assert old in text
    (folder / "manifest.json").write_text(text.replace(old, new))


@pytest.mark.parametrize("case", SHARDS)
@pytest.mark.parametrize("limit", [2**28, 0], ids=["hashed at start", "too long to hash at start"])
def test_damaged_shards_are_one_line(options, tmp_path, capsys, monkeypatch, case, limit):
    name, damage = SHARDS[case]
    if limit == 0 and case in ("a token beyond the vocabulary", "a negative token"):
        pytest.skip("the manifest matches, so only reading the tokens shows it")
    monkeypatch.setattr(shards, "HASH_AT_START_BYTES", limit)
    (tmp_path / "a.txt").write_text(WORDS)
    data = data_of(tmp_path, "a.txt")
    place = Path(prepare(DataConfig.model_validate(data), quiet=True).report["folder"])
    damage(place)
    path = write_config(tmp_path / "run.yaml", options(data=data))
    for main in (prepare_command.main, train_command):
        line = error_of(main, path, capsys)
        assert line.startswith(f"error: {place / name}: damaged (")
        assert line.endswith(f"; delete {place} and start again, which prepares the data")
    assert not (tmp_path / "runs/small").exists()
    shutil.rmtree(place)
    assert prepare_command.main(["--config", str(path)]) == 0


def test_text_shorter_than_a_window_is_one_line_with_the_numbers(options, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a word\n" * 5)
    data = data_of(tmp_path, "a.txt") | {"val_fraction": 0.3}
    line = error_of(train_command, write_config(tmp_path / "run.yaml", options(data=data)), capsys)
    assert "tokens, fewer than one window of 33: give more text or a smaller model.n_positions" in line


# --- changes ---------------------------------------------------------------------------------------


def test_a_run_does_not_resume_on_changed_text(options, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(WORDS)
    path = write_config(tmp_path / "run.yaml", options(steps=3, data=data_of(tmp_path, "a.txt")))
    assert train_command(["--config", str(path)]) == 0
    before = tensors(tmp_path / "runs/small", 3)
    (tmp_path / "a.txt").write_text(WORDS.replace("line 7 ", "line 8 "))
    line = error_of(train_command, path, capsys)
    assert "data: the text or the tokenizer has changed; choose another --name" in line
    (tmp_path / "a.txt").write_text(WORDS)
    assert train_command(["--config", str(path)]) == 0
    assert tensors(tmp_path / "runs/small", 3) == before


def test_shards_truncated_during_a_run_end_it_in_one_line_and_it_resumes_exactly(processes, options, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS * 20)
    long = {"steps": 150, "data": data_of(tmp_path, "a.txt"), "checkpoint": {"every": 10}, "eval": {"every": 150}}
    through, cut = (write_config(tmp_path / f"{name}.yaml", options(name=name, **long)) for name in ("through", "cut"))
    assert train_command(["--config", str(through)]) == 0
    (place,) = {path.parent for path in (tmp_path / "cache").glob(f"*/{TRAIN}")}
    process = processes.start("training.train:main", "--config", str(cut))
    folder = tmp_path / "runs/cut"
    until(lambda: list(folder.glob("checkpoints/step-*")), process)
    os.truncate(place / TRAIN, 4096)
    done = process.wait(60)
    error = done.stderr
    assert done.returncode == 2, done
    assert error.splitlines()[-1].startswith(f"error: {place / TRAIN}: damaged (cut to 4096 bytes while it was read)")
    assert "Traceback" not in error
    saved = sorted((folder / "checkpoints").glob("step-*"))
    assert saved and all(corruption(path) is None for path in saved)
    shutil.rmtree(place)
    assert train_command(["--config", str(cut)]) == 0
    assert rows(folder) == rows(tmp_path / "runs/through")
    assert tensors(folder, 150) == tensors(tmp_path / "runs/through", 150)


def until(there: Callable[[], object], process: Launch) -> None:
    for _ in range(6000):
        if there():
            return
        assert process.poll() is None, process.output("err")
        time.sleep(0.01)
    raise AssertionError("timed out")
