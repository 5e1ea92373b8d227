"""A full disk while shards, rows or events are written: one line, no torn file is used, and the run resumes.

Tests of saves are in test_disk.py.
"""

import copy
import os
import re
from pathlib import Path

import pytest
from conftest import no_file_beyond, rows, tensors, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_disk import fill, small_disk  # noqa: F401 (a fixture)

from training import prepare as prepare_command
from training.checkpoint import corruption
from training.data import build, prepare
from training.errors import UserError
from training.logging.jsonl import JSONLSink
from training.logging.tensorboard import TensorBoardSink
from training.train import main as train_command

PERCENT = [0, 10, 50, 90, 99]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_line(main, path: Path, capsys) -> str:
    """Run the command on the full disk; return its one error line."""
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error, error
    return error.splitlines()[-1]


# --- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "percents"),
    [({"type": "byte"}, PERCENT), ({"type": "bpe", "vocab_size": 300}, [0, 50])],
    ids=["byte", "bpe"],
)
def test_a_full_disk_during_preparation_leaves_nothing(
    config, options, run, small_disk, tmp_path, capsys, monkeypatch, tokenizer, percents  # noqa: F811
):  # fmt: skip
    """With space again, the run ends in the same bits as one whose disk was never full."""
    monkeypatch.setattr(build, "BATCH_CHARS", 50_000)  # several batches, though the text is small
    data = config().data.model_dump() | {"tokenizer": tokenizer, "workers": 1}
    dataset = Path(prepare(config(data=data).data, quiet=True).report["folder"])
    whole, disk = contents(dataset), small_disk(8192)
    for percent in percents:
        (disk / "cache").mkdir()
        fill(disk, sum(map(len, whole.values())) * percent // 100)
        here = data | {"cache_dir": str(disk / "cache"), "workers": 2 if percent == 50 else 1}
        path = write_config(tmp_path / "run.yaml", options(data=here))
        line = error_line(train_command if percent == 50 else prepare_command.main, path, capsys)
        assert re.fullmatch(
            rf"error: (cannot write )?{disk}/cache\S*: (cannot be written: )?No space left on device", line
        )
        assert [each for each in (disk / "cache").iterdir() if each.is_dir() or each.suffix == ".partial"] == []
        assert not (tmp_path / "runs/small").exists()
        (disk / "filler").unlink()
        assert prepare_command.main(["--config", str(path)]) == 0
        assert contents(disk / "cache" / dataset.name) == whole
        if percent != percents[-1]:
            clear(disk / "cache")
    assert train_command(["--config", str(path)]) == 0
    assert tensors(tmp_path / "runs/small", 8) == tensors(run(name="through", data=data), 8)


def clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("n_bytes", [0, 1, 4095, 100_001])
def test_shards_torn_inside_a_token_leave_nothing(config, tmp_path, monkeypatch, n_bytes):
    data_config = config().data.model_copy(update={"cache_dir": str(tmp_path / "cache"), "workers": 1})
    write_streams = build.write_streams

    def limited(*arguments):
        with no_file_beyond(n_bytes):
            return write_streams(*arguments)

    monkeypatch.setattr(build, "write_streams", limited)
    with pytest.raises(UserError, match=r"cache: cannot be written: File too large$"):
        prepare(data_config, quiet=True)
    assert not [each for each in (tmp_path / "cache").iterdir() if each.is_dir()]
    monkeypatch.undo()
    assert prepare(data_config, quiet=True).fingerprint == prepare(config().data, quiet=True).fingerprint


# --- rows and events -------------------------------------------------------------------------------


def file_of(sink) -> Path:
    """Return the file that the sink appends to."""
    return sink.path if isinstance(sink, JSONLSink) else Path(sink.file.name)


def size_of(write, sink, rows: list[dict], scratch: Path) -> int:
    """Return the number of bytes that the sink writes for the rows."""
    twin, twin_path = copy.copy(sink), scratch / "twin"
    with twin_path.open("wb") as twin.file:
        twin.path = twin_path
        write(twin, rows)
    return twin_path.stat().st_size


@pytest.mark.parametrize(("kind", "place"), [(JSONLSink, "metrics.jsonl"), (TensorBoardSink, "tensorboard")])
def test_rows_that_do_not_fit_on_the_disk_are_one_line_and_are_written_after_a_restart(
    options, run, tmp_path, capsys, monkeypatch, kind, place
):
    """The disk is full at the fourth row: only a percentage of its bytes is written."""
    changes = {"logging": {"every": 3, "tensorboard": True}, "steps": 6}
    through, write = run(name="through", **changes), kind.write
    for percent in PERCENT:
        folder = tmp_path / f"runs/full-{percent}"
        path = write_config(tmp_path / "run.yaml", options(name=folder.name, **changes))

        def limited(sink, new_rows, percent=percent):
            if new_rows[0]["step"] != 4:
                return write(sink, new_rows)
            room = size_of(write, sink, new_rows, tmp_path) * percent // 100
            with no_file_beyond(file_of(sink).stat().st_size + room):
                return write(sink, new_rows)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "write", limited)
            assert error_line(train_command, path, capsys) == f"error: cannot write {folder / place}: File too large"
        assert_torn_rows_are_ignored(folder, through)
        assert train_command(["--config", str(path)]) == 0
        assert rows(folder) == rows(through)
        assert tensors(folder, 6) == tensors(through, 6)
        assert curve(folder) == curve(through) and len(curve(folder)) == 6


def assert_torn_rows_are_ignored(folder: Path, through: Path) -> None:
    (saved,) = (folder / "checkpoints").iterdir()
    assert saved.name == "step-00000003" and corruption(saved) is None
    whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    assert len(whole) in (3, 4)
    assert curve(folder)[:3] == curve(through)[:3]


def curve(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(os.fspath(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]
