"""Background saves hold the tensors of the time of the call, run one at a time, and succeed on all ranks or none."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from typing import Any

import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import load_file

from training.checkpoint import (
    SINGLE,
    CheckpointWriter,
    TensorShard,
    WriterGroup,
    corruption,
    latest,
    list_checkpoints,
    load,
    read_tensors,
    tensor_shapes,
    write,
)
from training.checkpoint.write import write_tensors
from training.config import CheckpointConfig
from training.errors import UserError

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def shard(tensor: torch.Tensor) -> TensorShard:
    return TensorShard(tensor, 0, tensor.shape, is_owner=True)


def shards(value: float, n: int = 64) -> dict:
    return {"model": {"w": shard(torch.full((n, 32), value))}, "optimizer": {"w/step": shard(torch.tensor(value))}}


def test_safetensors_reads_the_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}-{shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in TYPES
        for shape in ((), (3,), (5, 7), (0, 4), (2, 3, 2))
    }
    tensors["strided"] = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "a", tensors, tensors.values())
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_changes_after_the_call_are_not_in_the_checkpoint(tmp_path):
    writer = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig(keep=100))
    weights = torch.ones(512, 512)
    for step in range(20):
        before = weights.clone()
        writer.save({"model": {"w": shard(weights)}, "optimizer": {}}, {"step": step}, None)
        weights.mul_(2)
        writer.wait()
        assert torch.equal(load_file(tmp_path / f"step-{step:08d}/model.safetensors")["w"], before), step


def test_the_next_save_and_close_wait_for_a_save(tmp_path):
    writer = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig(keep=100))
    for step in range(4):
        writer.save(shards(step), {"step": step}, None)
        assert sum(thread.name.startswith("saver") for thread in threading.enumerate()) <= 1
    writer.close()
    assert [step for step, path in list_checkpoints(tmp_path) if corruption(path) is None] == [0, 1, 2, 3]
    assert not any(thread.name.startswith("saver") for thread in threading.enumerate())


def test_a_foreground_save_is_complete_when_the_call_returns(tmp_path):
    CheckpointWriter(tmp_path, SINGLE, CheckpointConfig(background=False)).save(shards(1), {"step": 1}, None)
    assert corruption(tmp_path / "step-00000001") is None


def test_a_failed_save_raises_at_the_next_wait_and_keeps_the_checkpoint_before(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    writer = CheckpointWriter(folder, SINGLE, CheckpointConfig())
    writer.save(shards(1), {"step": 1}, None)
    writer.wait()
    folder.rename(elsewhere).with_name("checkpoints").write_text("a file where the folder should be")
    writer.save(shards(2), {"step": 2}, None)
    while writer.failure is None:
        time.sleep(0.01)
    with pytest.raises(UserError, match="step-00000002: the checkpoint could not be saved"):
        writer.wait()
    assert writer.failure is None
    folder.unlink()
    elsewhere.rename(folder)
    assert latest(folder, pytest.fail).name == "step-00000001"
    writer.save(shards(2), {"step": 2}, None)
    writer.wait()
    assert latest(folder, pytest.fail).name == "step-00000002"


def test_a_writing_thread_that_ends_is_an_error_and_not_a_wait_forever(tmp_path, monkeypatch, caplog):
    """Without memory a thread of Python's executor can end before it has set the outcome of its work."""

    def end(_item: Any) -> None:
        raise MemoryError

    writer = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig())
    monkeypatch.setattr(futures.thread._WorkItem, "run", end)
    writer.save(shards(1), {"step": 1}, None)
    writer._thread.join(30)
    assert writer.failure is not None
    with pytest.raises(UserError, match="could not be saved: the thread that writes it has ended"):
        writer.wait()
    writer.close()
    assert "Exception in worker" in caplog.text


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_tensors_with_nan_are_not_saved(tmp_path, kind):
    writer = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig())
    writer.save(shards(1), {"step": 1}, None)
    changed = shards(2.0)
    name, with_nan = next((name, p) for name, p in changed[kind].items() if p.tensor.is_floating_point())
    with_nan.tensor.view(-1)[-1] = float("nan")
    writer.save(changed, {"step": 2}, None)
    with pytest.raises(UserError, match=rf"step-00000002: the checkpoint could not be saved: {name} is not finite"):
        writer.wait()
    assert latest(tmp_path, pytest.fail).name == "step-00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_is_one_line_and_leaves_no_partial_checkpoint(tmp_path):
    program = f"""
import resource, signal
from pathlib import Path
from test_background_save import *
folder = Path({str(tmp_path)!r})
writer = CheckpointWriter(folder, SINGLE, CheckpointConfig())
writer.save(shards(1), {{"step": 1}}, None)
writer.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
writer.save(shards(2, n=4096), {{"step": 2}}, None)
try:
    writer.wait()
except UserError as error:
    print(error)
"""
    done = python(program)
    assert done.stdout == f"{tmp_path}/step-00000002: the checkpoint could not be saved: File too large\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert corruption(tmp_path / "step-00000001") is None


def python(program: str) -> subprocess.CompletedProcess:
    variables = environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=120)


def test_kill_9_during_a_save_leaves_the_checkpoint_before(tmp_path):
    program = f"""
import os, signal, threading, time
from pathlib import Path
from test_background_save import *
folder = Path({str(tmp_path)!r})
writer = CheckpointWriter(folder, SINGLE, CheckpointConfig())
writer.save(shards(1), {{"step": 1}}, None)
writer.wait()
writer.save(shards(2, n=400_000), {{"step": 2}}, None)
while not list(folder.glob(".step-*/model*")):
    time.sleep(0.0005)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(program).returncode == -signal.SIGKILL
    assert latest(tmp_path, pytest.fail).name == "step-00000001"
    assert list(tmp_path.glob(".step-00000002.tmp"))
    writer = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig())
    writer.save(shards(3), {"step": 3}, None)
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def writer_groups(size: int) -> list[WriterGroup]:
    """Return the groups of `size` ranks that are threads of this process."""
    values, barrier = [None] * size, threading.Barrier(size, timeout=20)

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    return [WriterGroup(rank, size, lambda value, rank=rank: gather(rank, value)) for rank in range(size)]


def rows_of(rank: int, size: int, n: int = 10) -> tuple[int, int]:
    return n * rank // size, n * (rank + 1) // size


def save_by(size: int, folder, one_file_gib: float, step: int = 1) -> list[CheckpointWriter]:
    """Save the rows of each rank; the first rank also saves the tensor that all ranks have."""
    whole, scalar = torch.arange(30.0).view(10, 3), torch.tensor(7.0)
    writers = [
        CheckpointWriter(folder, group, CheckpointConfig(one_file_gib=one_file_gib)) for group in writer_groups(size)
    ]

    def save(rank: int) -> None:
        start, stop = rows_of(rank, size)
        own = {
            "split": TensorShard(whole[start:stop], start, whole.shape, is_owner=True),
            "same": TensorShard(whole, 0, whole.shape, is_owner=rank == 0),
            "of the last": TensorShard(whole[: 10 * (rank == size - 1)], 0, whole.shape, is_owner=rank == size - 1),
        }
        writers[rank].save(
            {"model": own, "optimizer": {"x/step": TensorShard(scalar, 0, scalar.shape, rank == 0)}},
            {"step": step},
            None,
        )
        writers[rank].close()

    with futures.ThreadPoolExecutor(size) as pool:
        list(pool.map(save, range(size)))
    return writers


@pytest.mark.parametrize("one_file_gib", [8, 0])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_reads_what_another_number_wrote(tmp_path, size, one_file_gib):
    assert [writer.failure for writer in save_by(size, tmp_path, one_file_gib)] == [None] * size
    path, whole = tmp_path / "step-00000001", torch.arange(30.0).view(10, 3)
    assert corruption(path) is None
    assert len(list(path.glob("model*.safetensors"))) == (1 if one_file_gib else size)
    assert tensor_shapes(path, "model") == dict.fromkeys(("split", "same", "of the last"), whole.shape)
    assert all(torch.equal(tensor, whole) for tensor in load(path).model.values())
    assert load(path).optimizer == {"x/step": torch.tensor(7.0)}
    for readers in (1, 2, 3):
        for rank in range(readers):
            start, stop = rows_of(rank, readers)
            read = read_tensors(path, "model", {"split": (start, stop), "same": (stop, stop)})
            assert torch.equal(read["split"], whole[start:stop]) and read["same"].shape == (0, 3)
    with pytest.raises(KeyError, match="absent"):
        read_tensors(path, "model", {"absent": None})


def test_a_save_fails_on_all_ranks_if_one_cannot_write(tmp_path, monkeypatch):
    save_by(2, tmp_path, 0)

    def full_on_rank_1(path, *tensors):
        if path.name.endswith("-00002-of-00002.safetensors"):
            raise OSError(28, "No space left on device")
        return write_tensors(path, *tensors)

    monkeypatch.setattr(write, "write_tensors", full_on_rank_1)
    for writer in save_by(2, tmp_path, 0, step=2):
        assert str(writer.failure).endswith("could not be saved: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_every_file_of_several_ranks_is_verified(tmp_path):
    save_by(2, tmp_path, 0)
    for file in sorted((tmp_path / "step-00000001").iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert file.name in corruption(tmp_path / "step-00000001")
        file.write_bytes(data)
    assert corruption(tmp_path / "step-00000001") is None


def test_reading_some_rows_does_not_read_the_others(tmp_path):
    """Peak memory grows by less than 64 MiB when a process reads 16 of 256 MiB."""
    rows = torch.ones(16, 2**20)
    writer = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig())
    own = {f"{i}": shard(rows) for i in range(4)}
    writer.save({"model": own, "optimizer": {}}, {"step": 1}, None)
    writer.wait()
    program = f"""
import resource
from pathlib import Path
from test_background_save import read_tensors
path = Path({str(tmp_path / "step-00000001")!r})
read_tensors(path, "model", {{"0": (0, 1)}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = read_tensors(path, "model", {{str(i): (3, 4) for i in range(4)}})
assert all(tensor.sum() == 2**20 for tensor in read.values())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = python(program)
    assert int(done.stdout) < 64 * 1024, done.stderr


def test_the_manifest_lists_every_file_and_is_written_last(tmp_path):
    save_by(4, tmp_path, 0)
    path = tmp_path / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.keys() | {"manifest.json"} == {file.name for file in path.iterdir()}
    assert all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())
    times = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert max(times, key=times.get) == "manifest.json"
